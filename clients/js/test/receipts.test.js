/** What the client confirms, on a fake WebSocket and in virtual time. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { Clock, FakeWebSocket, TestClient, setRandom, settle } from "./fakes.js";

const TYPE = "SERVICE_CALL_CREATED";
/** @type {Clock} */
let clock;
/** @type {TestClient[]} */
const clients = [];

beforeEach(() => {
  clock = new Clock();
  setRandom(0);
  FakeWebSocket.all = [];
});
afterEach(() => {
  for (const { client } of clients.splice(0)) client.close();
  mock.timers.reset();
  mock.restoreAll();
});

/** An event id of this position, in the stream with this tag. @param {number | bigint} at */
const id = (at, tag = "4723") => `1790000000000-${at}-${tag}`;

/** Admit the client, and say which types the gateway tracks; null: it has not said it yet. */
const admit = (/** @type {TestClient} */ client, /** @type {string[] | null} */ receipts = [TYPE]) => {
  client.socket.admit({ last_event_id: client.client.lastEventId || id(0) });
  if (receipts) client.socket.receive({ type: "intervals", receipts });
};

/** @param {ConstructorParameters<typeof TestClient>[0]} [options] @param {string[] | null} [receipts] */
const open = async (options, receipts) => {
  const client = new TestClient(options);
  clients.push(client);
  await settle();
  admit(client, receipts);
  return client;
};

/** @param {TestClient} client @param {string} event_id */
const receive = (client, event_id, type = TYPE) =>
  client.socket.receive({ type, tenant_id: 1, branch_id: 1, event_id });

/** The messages of one type that were sent on the newest socket. @param {TestClient} client @param {string} type */
const sent = (client, type) =>
  client.socket.sent
    .filter((text) => text.startsWith("{"))
    .map((text) => JSON.parse(text))
    .filter((message) => message.type === type)
    .map((message) => message.last_event_id ?? message.event_id);

/** Answers of the gateway to POST; calls of fetch. @param {...(number | Error)} statuses */
const fakeFetch = (...statuses) => {
  /** @type {{ url: string, body: string, token: string }[]} */
  const calls = [];
  mock.method(globalThis, "fetch", async (/** @type {URL} */ url, /** @type {any} */ { body, headers }) => {
    calls.push({ url: url.href, body, token: headers.Authorization });
    const status = statuses.shift() ?? 204;
    if (typeof status !== "number") throw status;
    return { status };
  });
  return calls;
};

test("one ack confirms the tracked events of a fifth of a second", async () => {
  const client = await open();
  for (const at of [1, 2, 3]) receive(client, id(at));
  await clock.pass(0.1);
  assert.deepEqual(sent(client, "ack"), []);
  await clock.pass(0.1);
  assert.deepEqual(sent(client, "ack"), [id(3)]);
  await clock.pass(5);
  for (let at = 4; at < 14; at++) {
    receive(client, id(at));
    await clock.pass(0.1);
  }
  assert.ok(sent(client, "ack").length >= 5, `${sent(client, "ack")}`); // none waits for a pause
});

for (const [name, receipts] of /** @type {[string, string[] | null][]} */ ([
  ["that tracks other types", ["CHECK_PAID"]],
  ["that tracks none", []],
  ["of an older version", null],
])) {
  test(`to a gateway ${name} nothing but pings is sent, and no timer runs`, async () => {
    const client = await open({}, receipts);
    const before = client.socket.sent.length;
    for (let at = 1; at < 300; at++) receive(client, id(at));
    if (!receipts?.length) client.client.seen(id(1));
    await clock.pass(20);
    assert.deepEqual(client.socket.sent.slice(before), []);
    client.client.close();
    assert.deepEqual(sent(client, "ack"), []);
  });
}

for (const receipts of [[TYPE], [], undefined]) {
  test(`what comes before the gateway has said what it tracks waits for that: ${receipts}`, async () => {
    const client = await open({}, null);
    for (const at of [1, 2]) receive(client, id(at));
    client.client.seen(id(1));
    await clock.pass(1);
    const before = client.socket.sent.length;
    client.socket.receive({ type: "intervals", receipts });
    await clock.pass(1);
    assert.deepEqual(sent(client, "ack"), receipts?.length ? [id(2)] : []);
    assert.deepEqual(sent(client, "seen"), receipts?.length ? [id(1)] : []);
    assert.equal(client.socket.sent.length - before, receipts?.length ? 2 : 0);
  });
}

test("an escalated event has an ack of its own, and does not move the position back", async () => {
  const client = await open();
  receive(client, id(7));
  receive(client, id(3));
  assert.equal(client.client.lastEventId, id(7));
  await clock.pass(0.2);
  assert.deepEqual(sent(client, "ack"), [id(7), id(3)]);
  receive(client, id(4));
  receive(client, id(9)); // it came later, so it confirms the one before it
  await clock.pass(0.2);
  assert.deepEqual(sent(client, "ack"), [id(7), id(3), id(9)]);
  client.socket.end(1006);
  await clock.pass(0.1);
  client.socket.open();
  assert.deepEqual(sent(client, "resume"), [id(9)]);
  assert.equal(client.of("event").length, 4);
});

test("positions are compared as numbers, and those of other streams are not", async () => {
  const client = await open();
  const last = id(2n ** 60n);
  const order = [id(9), id(10), id(2n ** 60n - 1n), last, "999-5-4723", id(1, "0abc"), id(11), "a backend's id"];
  const positions = order.map((each) => {
    receive(client, each);
    return client.client.lastEventId;
  });
  assert.deepEqual(positions, [...order.slice(0, 4), last, order[5], order[5], order[7]]);
  await clock.pass(0.2);
  assert.deepEqual(sent(client, "ack"), [last, "999-5-4723", id(1, "0abc"), id(11)]);
});

test("the position that the gateway answers with may be further back", async () => {
  const client = await open();
  receive(client, id(7));
  client.socket.end(1006);
  await clock.pass(0.1);
  client.socket.admit({ recovered: false, last_event_id: `${id(2)}.${id(5, "0abc")}` });
  receive(client, id(3));
  assert.equal(client.client.lastEventId, id(3));
  receive(client, id(4, "0abc"));
  assert.equal(client.client.lastEventId, id(3));
});

test("an event that comes again is confirmed again, and not handed on", async () => {
  const client = await open();
  receive(client, id(3));
  receive(client, id(5));
  client.socket.end(1006);
  await clock.pass(0.1);
  admit(client);
  receive(client, id(3));
  await clock.pass(0.2);
  assert.deepEqual(sent(client, "ack"), [id(3)]);
  assert.equal(client.of("event").length, 2);
});

test("a ping names the newest event", async () => {
  const client = await open();
  await clock.pass(25.1);
  client.socket.answerPings();
  receive(client, id(7));
  receive(client, id(3));
  await clock.pass(25.1);
  assert.deepEqual(sent(client, "ping"), [id(0), id(7)]);
});

test("a client that only watches confirms nothing", async () => {
  const client = await open({ confirm: false });
  receive(client, id(7));
  await clock.pass(30);
  assert.deepEqual(client.socket.pings, ["ping"]);
  assert.deepEqual(sent(client, "ack"), []);
  assert.equal(JSON.parse(client.socket.sent[0]).confirm, false); // in the message that resumes
});

test("a client whose events nobody listens to confirms nothing, until somebody does", async () => {
  const client = await open({ onEvent: undefined });
  receive(client, id(7));
  await clock.pass(30);
  assert.deepEqual(client.socket.pings, ["ping"]);
  assert.deepEqual(sent(client, "ack"), []);
  client.client.addEventListener("event", () => {});
  receive(client, id(8));
  await clock.pass(1);
  assert.deepEqual(sent(client, "ack"), [id(8)]);
});

for (const [name, end] of /** @type {[string, (client: TestClient) => void][]} */ ([
  ["close()", ({ client }) => client.close()],
  ["reconnect()", ({ client }) => client.reconnect()],
  ["leaving the page", ({ page }) => page.dispatchEvent(new Event("pagehide"))],
])) {
  test(`what waits is sent before ${name}`, async () => {
    const client = await open();
    const { socket } = client;
    for (const at of [1, 2, 3]) receive(client, id(at));
    for (const at of [1, 2]) client.client.seen(id(at));
    end(client);
    const messages = socket.sent.filter((text) => /"(ack|seen)"/.test(text)).map((text) => JSON.parse(text));
    assert.deepEqual(messages, [
      { type: "seen", event_id: id(1) },
      { type: "ack", last_event_id: id(3) },
      { type: "seen", event_id: id(2) },
    ]);
  });
}

test("a hidden page, whose timers are late, confirms at once", async () => {
  const client = await open();
  client.page.show(false);
  receive(client, id(1));
  assert.deepEqual(sent(client, "ack"), [id(1)]);
});

test("an event is confirmed after its handler has returned", async () => {
  const client = await open({ onEvent: () => assert.deepEqual(sent(client, "ack"), []) });
  client.page.show(false);
  receive(client, id(1));
  assert.deepEqual(sent(client, "ack"), [id(1)]);
});

test("a handler that ends the connection leaves no ack for the next one", async () => {
  const client = await open({ onEvent: () => client.client.reconnect() });
  receive(client, id(1));
  await settle();
  admit(client);
  await clock.pass(1);
  assert.deepEqual(sent(client, "ack"), []);
});

test("what the user has seen is told at once, and no faster than the rate limit allows", async () => {
  const client = await open();
  for (let at = 1; at <= 30; at++) receive(client, id(at));
  client.client.seen(client.of("event")[0]);
  assert.deepEqual(sent(client, "seen"), [id(1)]);
  for (let at = 2; at <= 30; at++) client.client.seen(id(at));
  await clock.pass(1, 10);
  assert.ok(sent(client, "seen").length <= 12, `${sent(client, "seen")}`);
  await clock.pass(2.1);
  assert.deepEqual(sent(client, "seen"), client.of("event").map((event) => event.event_id));
  assert.throws(() => client.client.seen({ type: TYPE, tenant_id: 1, branch_id: 1 }), TypeError);
});

test("what was seen without a connection, or on one that was lost, is told over HTTP when it is back", async () => {
  const calls = fakeFetch(new TypeError("no network"), 503);
  const client = await open();
  receive(client, id(1));
  client.client.seen(id(1));
  client.socket.end(1006); // no pong has shown that the gateway has it
  client.client.seen(id(2));
  assert.equal(calls.length, 0);
  for (let again = 0; again < 4; again++) {
    await clock.pass(1);
    admit(client);
    await clock.pass(1);
    client.socket.end(1006);
  }
  assert.deepEqual(
    calls.map(({ body }) => JSON.parse(body).event_id),
    [id(1), id(2), id(1), id(2)],
  );
  assert.equal(calls[0].url, "https://gateway.example/ws/receipts");
  assert.equal(calls[0].token, "Bearer token");
});

test("a request that failed is repeated after the next pong", async () => {
  const calls = fakeFetch(503, new TypeError("no network"), 204);
  const client = await open();
  client.client.seen(id(1));
  for (let pings = 0; pings < 5; pings++) {
    await clock.pass(25.1);
    assert.equal(calls.length, Math.min(3, pings + 1));
    client.socket.answerPings();
  }
});

for (const isBefore of [true, false]) {
  test(`a pong shows that the gateway knows what was seen before the ping: ${isBefore}`, async () => {
    const calls = fakeFetch();
    const client = await open();
    receive(client, id(1));
    if (isBefore) client.client.seen(id(1));
    await clock.pass(25.1);
    if (!isBefore) client.client.seen(id(1));
    client.socket.answerPings();
    client.socket.end(1006);
    await clock.pass(1);
    admit(client);
    await clock.pass(1);
    assert.equal(calls.length, isBefore ? 0 : 1);
  });
}
