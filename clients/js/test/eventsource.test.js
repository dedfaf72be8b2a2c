/** Server-Sent Events with a standard EventSource (Node's, --experimental-eventsource). */

import assert from "node:assert/strict";
import { after, afterEach, beforeEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import {
  Gateway, connections, publish, staffToken, tableToken, trackedRoutes, untilReceipts,
} from "./gateway.js";

const gateway = new Gateway();
beforeEach(() => gateway.start());
after(() => gateway.stop("SIGTERM"));

/** @type {EventSource[]} */
const sources = [];
afterEach(() => sources.splice(0).forEach((source) => source.close()));

/** @param {string} token */
const listen = (token, to = gateway) => {
  const url = to.url("waiter").replace("ws:", "http:");
  const source = new EventSource(`${url}/events?last_event_id=&token=${token}`);
  sources.push(source);
  /** @type {any[]} */
  const received = [];
  source.onmessage = ({ data, lastEventId }) => received.push({ ...JSON.parse(data), lastEventId });
  source.addEventListener("close", ({ data }) => received.push(JSON.parse(data)));
  return { source, received };
};

/** Wait until a condition is true. @param {() => unknown} condition @param {number} [seconds] */
const until = async (condition, seconds = 10) => {
  for (const end = Date.now() + seconds * 1000; !(await condition()); await sleep(20)) {
    assert.ok(Date.now() < end, `not true within ${seconds} s`);
  }
};

test("an EventSource reconnects by itself and misses no event", async () => {
  const { source, received } = listen(staffToken());
  await until(() => received.length);
  assert.deepEqual([received[0].type, received[0].recovered], ["resumed", true]);
  await publish({ id: "before" });
  await until(() => received.length === 2);
  assert.equal(received[1].lastEventId, received[1].event_id);

  await gateway.stop("SIGTERM");
  await until(() => received.length === 3);
  assert.equal(received[2].code, 1001);
  await publish({ id: "meanwhile" });
  await gateway.start();
  await until(() => received.length === 5);
  await until(async () => (await connections(gateway)) === 1);
  await publish({ id: "after" });
  await until(() => received.length === 6);
  assert.deepEqual(
    received.slice(3).map(({ id, type, count }) => id ?? [type, count]),
    [["resumed", 1], "meanwhile", "after"],
  );
  assert.equal(source.readyState, EventSource.OPEN);
});

test("an EventSource that is refused does not reconnect", async () => {
  const { source, received } = listen(staffToken({ exp: 1 }));
  await until(() => source.readyState === EventSource.CLOSED);
  await sleep(100);
  assert.deepEqual(received, []);
  assert.equal(await connections(gateway), 0);
});

test("a page with an EventSource confirms over HTTP what it has received and its user has seen", async () => {
  const tracking = new Gateway({ WS_ROUTES_FILE: await trackedRoutes() });
  await tracking.start();
  try {
    const { received } = listen(staffToken(), tracking);
    await until(() => received.length);
    for (const id of ["a", "b"]) await publish({ type: "SERVICE_CALL_CREATED", id });
    await until(() => received.length === 3);
    const [, a, b] = received.map(({ event_id }) => event_id);
    /** @param {object} body @param {string} token */
    const confirm = async (body, token) => {
      const headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
      return (await tracking.http("/ws/receipts", { method: "POST", headers, body: JSON.stringify(body) })).status;
    };
    assert.equal(await confirm({ last_event_id: b }, tableToken()), 204); // somebody who was not sent it
    await untilReceipts(tracking, b, [1, 0, 0]);
    assert.equal(await confirm({ last_event_id: b }, staffToken()), 204);
    await untilReceipts(tracking, a, [1, 1, 0]);
    await untilReceipts(tracking, b, [1, 1, 0]);
    assert.equal(await confirm({ event_id: a }, staffToken()), 204);
    await untilReceipts(tracking, a, [1, 1, 1]);
  } finally {
    await tracking.stop("SIGKILL");
  }
});
