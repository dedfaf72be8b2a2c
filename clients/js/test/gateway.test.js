/** The client against a real gateway: processes, sockets, Redis. */

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, afterEach, beforeEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { connect } from "../../../trio_gateway/static/client.js";
import { FakePage } from "./fakes.js";
import {
  Gateway, STREAM, Calls, command, connections, publish, staffToken, tableToken, trackedRoutes, untilReceipts,
} from "./gateway.js";

/** @typedef {import("../../../trio_gateway/static/client.js").Options} Options */

const SOURCE = new URL("../../../trio_gateway/static/client.js", import.meta.url);
const QUICK = { backOff: 0.2, longest: 0.2 };

const gateway = new Gateway();
beforeEach(() => gateway.start());
after(() => gateway.stop("SIGTERM"));

/** @type {ReturnType<typeof connect>[]} */
const clients = [];
afterEach(() => clients.splice(0).forEach((client) => client.close()));

/** @param {Partial<Options>} [options] */
const start = (options = {}) => {
  const calls = new Calls();
  const client = connect({
    url: gateway.url("waiter"),
    token: () => staffToken(),
    ...calls.listeners,
    ...options,
  });
  clients.push(client);
  return { calls, client };
};

/** @param {Calls} calls */
const ids = (calls) => calls.of("event").map((event) => event.id);

test("a waiter receives the events of its sector only, and no part of a token is logged", async () => {
  const token = staffToken();
  const { calls, client } = start({ token });
  await calls.admitted();
  await publish({ id: "other sector", sector_id: 6 });
  await publish({ id: "own sector" });
  await calls.until(() => ids(calls).length);
  assert.deepEqual(ids(calls), ["own sector"]);
  assert.equal(client.lastEventId, calls.of("event")[0].event_id);
  client.close();
  while (!gateway.log.includes('"endpoint":"waiter"')) await sleep(20);
  for (const part of token.split(".")) assert.ok(!gateway.log.includes(part));
});

test("a diner connects with a table token", async () => {
  const { calls } = start({ url: gateway.url("diner"), token: tableToken() });
  await calls.admitted();
  await publish({ id: "for the table" });
  await calls.until(() => ids(calls).length);
});

test("the client that the gateway serves is this file, and it works as a module", async () => {
  const served = await (await gateway.http("/ws/client.js")).text();
  assert.equal(served, await readFile(SOURCE, "utf8"));
  const module = await import(`data:text/javascript,${encodeURIComponent(served)}`);
  const calls = new Calls();
  const url = gateway.url("waiter");
  clients.push(module.connect({ url, token: staffToken(), ...calls.listeners }));
  await calls.admitted();
});

test("events published while the gateway was killed arrive once and in order", async () => {
  const { calls } = start({ timings: QUICK });
  await calls.admitted();
  await publish({ id: "before" });
  await calls.until(() => ids(calls).length);
  await gateway.stop("SIGKILL");
  for (const id of ["a", "b", "c"]) await publish({ id });
  await gateway.start();
  await calls.admitted(2);
  await publish({ id: "after" });
  await calls.until(() => ids(calls).includes("after"));
  assert.deepEqual(ids(calls), ["before", "a", "b", "c", "after"]);
  assert.deepEqual(calls.of("gap"), []);
});

test("a client that had received no event resumes as well", async () => {
  const { calls } = start({ timings: QUICK });
  await calls.admitted();
  await gateway.stop("SIGKILL");
  await publish({ id: "missed" });
  await gateway.start();
  await calls.until(() => ids(calls).length);
  assert.deepEqual(ids(calls), ["missed"]);
});

test("after SIGTERM it reconnects after the hint of the gateway, and not before", async () => {
  const { calls } = start({ timings: QUICK });
  await calls.admitted();
  await gateway.stop("SIGTERM");
  const [ending] = calls.of("close");
  assert.equal(ending.code, 1001);
  assert.match(ending.reason, /^retry in \d+\.\ds$/);
  assert.equal(`retry in ${ending.retryIn.toFixed(1)}s`, ending.reason);
  await gateway.start();
  await calls.admitted(2);
  const closed = calls.all.findIndex(({ name }) => name === "close");
  const again = calls.all.findIndex(
    ({ name, detail }, i) => i > closed && name === "state" && detail === "connecting",
  );
  const waited = calls.all[again].at - calls.all[closed].at;
  assert.ok(waited > ending.retryIn - 0.02, `${waited} s instead of ${ending.retryIn}`);
});

test("a refused token is tried once", async () => {
  let providerCalls = 0;
  const expired = staffToken({ exp: 1_700_000_000 });
  const { calls, client } = start({
    token: () => {
      providerCalls++;
      return expired;
    },
    timings: QUICK,
  });
  await calls.until(() => calls.of("refused").length);
  await sleep(500);
  assert.equal(providerCalls, 2);
  assert.equal(client.state, "refused");
  assert.deepEqual(
    calls.of("close").map(({ code }) => code),
    [4001, 4001],
  );
  assert.equal(calls.of("state").filter((state) => state === "open").length, 0);
});

test("a refused token is replaced by a fresh one", async () => {
  const { calls } = start({
    token: ({ refused }) => staffToken(refused ? {} : { exp: 1_700_000_000 }),
  });
  await calls.admitted();
  assert.equal(calls.of("close")[0].code, 4001);
});

test("a role that is not admitted is refused", async () => {
  const { calls } = start({ token: staffToken({ roles: ["KITCHEN"] }) });
  await calls.until(() => calls.of("refused").length);
  assert.equal(calls.of("refused")[0].code, 4003);
});

test("after the rate limit it waits for the cool-down", async () => {
  const { calls, client } = start({ timings: { coolDown: 0.5, ...QUICK } });
  await calls.admitted();
  const requests = Array.from({ length: 30 }, () => client.refreshSectors());
  await Promise.allSettled(requests);
  await calls.until(() => calls.of("close").length);
  const [{ code, retryIn }] = calls.of("close");
  assert.equal(code, 4029);
  assert.ok(retryIn >= 0.5 && retryIn <= 1, `${retryIn}`);
  await calls.admitted(2);
});

test("a connection over the user's limit is closed with 1013, and admitted when there is room", async () => {
  const full = new Gateway({ WS_MAX_CONNECTIONS_PER_USER: "1" });
  await full.start();
  try {
    const first = start({ url: full.url("waiter") });
    await first.calls.admitted();
    const second = start({ url: full.url("waiter"), timings: QUICK });
    await second.calls.until(() => second.calls.of("close").length >= 2);
    assert.equal(second.calls.of("close")[0].code, 1013);
    first.client.close();
    await second.calls.admitted();
  } finally {
    await full.stop("SIGTERM");
  }
});

test("a position that has been trimmed is reported as a gap", async () => {
  const { calls } = start({ timings: QUICK });
  await calls.admitted();
  await gateway.stop("SIGKILL");
  await publish({ id: "lost" });
  await publish({ id: "left" });
  await command("XTRIM", STREAM, "MAXLEN", "1");
  await gateway.start();
  await calls.admitted(2);
  await calls.until(() => calls.of("gap").length);
  assert.deepEqual(calls.of("gap"), ["not_recovered"]);
});

test("entries that are trimmed before they are read are reported as a gap", async () => {
  const { calls } = start();
  await calls.admitted();
  process.kill(gateway.pid, "SIGSTOP");
  // The first one may be read already: Redis has answered the read that was blocked.
  for (const id of ["perhaps read", "trimmed", "left"]) await publish({ id });
  await command("XTRIM", STREAM, "MAXLEN", "1");
  process.kill(gateway.pid, "SIGCONT");
  await calls.until(() => calls.of("gap").length);
  assert.deepEqual(calls.of("gap"), ["lost"]);
});

test("the token is renewed on the connection, which outlives the first token", async () => {
  const now = Math.floor(Date.now() / 1000);
  const lives = [8, 600];
  const { calls } = start({ token: () => staffToken({ exp: now + (lives.shift() ?? 600) }) });
  await calls.admitted();
  await sleep((now + 9) * 1000 - Date.now());
  await publish({ id: "after the first token's expiry" });
  await calls.until(() => ids(calls).length);
  assert.equal(lives.length, 0);
  assert.deepEqual(calls.of("close"), []);
});

test("a gateway that hangs is noticed when the tab is shown, and resumed on when it is back", async () => {
  const page = new FakePage();
  const timings = { ...QUICK, shortPatience: 0.3, connect: 0.5 };
  const { calls, client } = start({ page, timings });
  await calls.admitted();
  process.kill(gateway.pid, "SIGSTOP");
  try {
    page.show(true);
    await calls.until(() => calls.of("close").length);
    assert.equal(calls.of("close")[0].reason, "no answer to a ping");
    await publish({ id: "meanwhile" });
  } finally {
    process.kill(gateway.pid, "SIGCONT");
  }
  await calls.until(() => ids(calls).length);
  assert.equal(client.state, "open");
  assert.deepEqual(ids(calls), ["meanwhile"]);
});

test("a tab that is shown again keeps a live socket", async () => {
  const page = new FakePage();
  const { calls } = start({ page });
  await calls.admitted();
  page.show(false);
  page.show(true);
  await calls.until(() => calls.of("message").some((message) => message?.type === "pong"));
  assert.deepEqual(calls.of("close"), []);
});

test("offline it does not reconnect, online it resumes at once", async () => {
  const page = new FakePage();
  const { calls, client } = start({ page, timings: QUICK });
  await calls.admitted();
  page.network(false);
  await gateway.stop("SIGKILL");
  await calls.until(() => client.state === "offline");
  await publish({ id: "while offline" });
  await gateway.start();
  await sleep(600);
  assert.equal(client.state, "offline");
  page.network(true);
  await calls.until(() => ids(calls).length);
  assert.deepEqual(ids(calls), ["while offline"]);
});

test("it pings as often as a gateway with a short heartbeat timeout asks", async () => {
  const strict = new Gateway({ WS_HEARTBEAT_TIMEOUT: "2", WS_CLEANUP_INTERVAL: "0.5" });
  await strict.start();
  try {
    const { calls } = start({ url: strict.url("waiter") });
    await calls.admitted();
    await sleep(3500);
    assert.deepEqual(calls.of("close"), []);
  } finally {
    await strict.stop("SIGTERM");
  }
});

test("a page has one socket to a URL", async () => {
  const page = new FakePage();
  const first = start({ page });
  await first.calls.admitted();
  const second = start({ page });
  await second.calls.admitted();
  assert.equal(first.client.state, "closed");
  while ((await connections(gateway)) !== 1) await sleep(20);
});

test("refreshSectors returns the sectors that the gateway has looked up", async () => {
  const { calls, client } = start();
  await calls.admitted();
  assert.deepEqual(await client.refreshSectors(), [5]);
});

test("presence is that of all gateways, and is told again after a reconnect", async () => {
  const settings = { WS_CLUSTER: "true", WS_PRESENCE_GRACE: "0.5" };
  const [first, second] = [new Gateway(settings), new Gateway(settings)];
  await Promise.all([first.start(), second.start()]);
  try {
    const admin = start({
      url: first.url("admin"),
      token: () => staffToken({ sub: "3", roles: ["ADMIN"] }),
      timings: QUICK,
    });
    /** @type {string[]} */
    let present = [];
    admin.client.watchPresence(1, ({ users, sessions }) => {
      present = [...users.map((each) => `${each.endpoint} ${each.user_id}`), ...sessions.map((each) => `${each.session_id}`)].sort();
    });
    /** @param {string[]} expected */
    const until = async (...expected) => {
      const end = Date.now() + 20_000;
      while (present.join() !== expected.join()) {
        assert.ok(Date.now() < end, `${present}`);
        await sleep(20);
      }
    };
    await until("admin 3");
    const waiter = start({ url: second.url("waiter") });
    start({ url: second.url("diner"), token: tableToken() });
    await until("456", "admin 3", "waiter 21");
    await first.stop("SIGKILL");
    waiter.client.close();
    await first.start();
    await until("456", "admin 3");
  } finally {
    await Promise.all([first.stop("SIGKILL"), second.stop("SIGKILL")]);
  }
});

test("the gateway knows what the client has received and what its user has seen", async () => {
  const tracking = new Gateway({ WS_ROUTES_FILE: await trackedRoutes() });
  await tracking.start();
  try {
    const { calls, client } = start({ url: tracking.url("waiter"), timings: QUICK });
    await calls.admitted();
    for (const id of ["a", "b"]) await publish({ type: "SERVICE_CALL_CREATED", id });
    await calls.until(() => ids(calls).length === 2);
    const [a, b] = calls.of("event");
    await untilReceipts(tracking, a.event_id, [1, 1, 0]);
    await untilReceipts(tracking, b.event_id, [1, 1, 0]);
    client.seen(a);
    await untilReceipts(tracking, a.event_id, [1, 1, 1]);
    client.reconnect();
    await calls.admitted(2);
    client.seen(b.event_id);
    await untilReceipts(tracking, b.event_id, [1, 1, 1]);
  } finally {
    await tracking.stop("SIGKILL");
  }
});
