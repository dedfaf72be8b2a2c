/** Server-Sent Events as a standard EventSource hears them (Node's own, --experimental-eventsource). */

import assert from "node:assert/strict";
import { after, afterEach, beforeEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { Gateway, connections, publish, staffToken } from "./gateway.js";

const gateway = new Gateway();
beforeEach(() => gateway.start());
after(() => gateway.stop("SIGTERM"));

/** @type {EventSource[]} */
const sources = [];
afterEach(() => sources.splice(0).forEach((source) => source.close()));

/** @param {string} token */
const listen = (token) => {
  const url = gateway.url("waiter").replace("ws:", "http:");
  const source = new EventSource(`${url}/events?last_event_id=&token=${token}`);
  sources.push(source);
  /** @type {any[]} */
  const heard = [];
  source.onmessage = ({ data, lastEventId }) => heard.push({ ...JSON.parse(data), lastEventId });
  source.addEventListener("close", ({ data }) => heard.push(JSON.parse(data)));
  return { source, heard };
};

/** @param {() => unknown} true_ @param {number} [seconds] */
const until = async (true_, seconds = 10) => {
  for (const end = Date.now() + seconds * 1000; !(await true_()); await sleep(20)) {
    assert.ok(Date.now() < end, `not so within ${seconds} s`);
  }
};

test("an EventSource comes back by itself and misses nothing", async () => {
  const { source, heard } = listen(staffToken());
  await until(() => heard.length);
  assert.deepEqual([heard[0].type, heard[0].recovered], ["resumed", true]);
  await publish({ id: "before" });
  await until(() => heard.length === 2);
  assert.equal(heard[1].lastEventId, heard[1].event_id);

  await gateway.stop("SIGTERM");
  await until(() => heard.length === 3);
  assert.equal(heard[2].code, 1001);
  await publish({ id: "meanwhile" });
  await gateway.start();
  await until(() => heard.length === 5);
  await until(async () => (await connections(gateway)) === 1);
  await publish({ id: "after" });
  await until(() => heard.length === 6);
  assert.deepEqual(
    heard.slice(3).map(({ id, type, count }) => id ?? [type, count]),
    [["resumed", 1], "meanwhile", "after"],
  );
  assert.equal(source.readyState, EventSource.OPEN);
});

test("an EventSource that is refused stops", async () => {
  const { source, heard } = listen(staffToken({ exp: 1 }));
  await until(() => source.readyState === EventSource.CLOSED);
  await sleep(100);
  assert.deepEqual(heard, []);
  assert.equal(await connections(gateway), 0);
});
