/** The client against a real gateway: processes, sockets, Redis. */

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, afterEach, beforeEach, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";

import { connect } from "../../../trio_gateway/static/client.js";
import { FakePage } from "./fakes.js";
import { Gateway, STREAM, Told, command, connections, publish, staffToken, tableToken } from "./gateway.js";

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
  const told = new Told();
  const client = connect({
    url: gateway.url("waiter"),
    token: () => staffToken(),
    ...told.listeners,
    ...options,
  });
  clients.push(client);
  return { told, client };
};

/** @param {Told} told */
const ids = (told) => told.of("event").map((event) => event.id);

test("a waiter hears what is for waiters, and no token comes near a log", async () => {
  const token = staffToken();
  const { told, client } = start({ token });
  await told.letIn();
  await publish({ id: "other sector", sector_id: 6 });
  await publish({ id: "own sector" });
  await told.until(() => ids(told).length);
  assert.deepEqual(ids(told), ["own sector"]);
  assert.equal(client.lastEventId, told.of("event")[0].event_id);
  client.close();
  while (!gateway.log.includes('"endpoint":"waiter"')) await sleep(20);
  for (const part of token.split(".")) assert.ok(!gateway.log.includes(part));
});

test("a diner connects with a table token", async () => {
  const { told } = start({ url: gateway.url("diner"), token: tableToken() });
  await told.letIn();
  await publish({ id: "for the table" });
  await told.until(() => ids(told).length);
});

test("the client that the gateway serves works, too", async () => {
  const served = await (await gateway.http("/ws/client.js")).text();
  assert.equal(served, await readFile(SOURCE, "utf8"));
  const module = await import(`data:text/javascript,${encodeURIComponent(served)}`);
  const told = new Told();
  const url = gateway.url("waiter");
  clients.push(module.connect({ url, token: staffToken(), ...told.listeners }));
  await told.letIn();
});

test("what it missed while the gateway was killed comes once, and in order", async () => {
  const { told } = start({ timings: QUICK });
  await told.letIn();
  await publish({ id: "before" });
  await told.until(() => ids(told).length);
  await gateway.stop("SIGKILL");
  for (const id of ["a", "b", "c"]) await publish({ id });
  await gateway.start();
  await told.letIn(2);
  await publish({ id: "after" });
  await told.until(() => ids(told).includes("after"));
  assert.deepEqual(ids(told), ["before", "a", "b", "c", "after"]);
  assert.deepEqual(told.of("gap"), []);
});

test("a client that had heard nothing resumes as well", async () => {
  const { told } = start({ timings: QUICK });
  await told.letIn();
  await gateway.stop("SIGKILL");
  await publish({ id: "missed" });
  await gateway.start();
  await told.until(() => ids(told).length);
  assert.deepEqual(ids(told), ["missed"]);
});

test("at SIGTERM it comes back when the gateway has said, and not before", async () => {
  const { told } = start({ timings: QUICK });
  await told.letIn();
  await gateway.stop("SIGTERM");
  const [ending] = told.of("close");
  assert.equal(ending.code, 1001);
  assert.match(ending.reason, /^retry in \d+\.\ds$/);
  assert.equal(`retry in ${ending.retryIn.toFixed(1)}s`, ending.reason);
  await gateway.start();
  await told.letIn(2);
  const closed = told.all.findIndex(({ name }) => name === "close");
  const again = told.all.findIndex(
    ({ name, detail }, i) => i > closed && name === "state" && detail === "connecting",
  );
  const waited = told.all[again].at - told.all[closed].at;
  assert.ok(waited > ending.retryIn - 0.02, `${waited} s instead of ${ending.retryIn}`);
});

test("a dead token is tried once", async () => {
  let asked = 0;
  const dead = staffToken({ exp: 1_700_000_000 });
  const { told, client } = start({
    token: () => {
      asked++;
      return dead;
    },
    timings: QUICK,
  });
  await told.until(() => told.of("refused").length);
  await sleep(500);
  assert.equal(asked, 2);
  assert.equal(client.state, "refused");
  assert.deepEqual(
    told.of("close").map(({ code }) => code),
    [4001, 4001],
  );
  assert.equal(told.of("state").filter((state) => state === "open").length, 0);
});

test("a dead token gives way to a fresh one", async () => {
  const { told } = start({
    token: ({ refused }) => staffToken(refused ? {} : { exp: 1_700_000_000 }),
  });
  await told.letIn();
  assert.equal(told.of("close")[0].code, 4001);
});

test("a role that is not admitted is the end", async () => {
  const { told } = start({ token: staffToken({ roles: ["KITCHEN"] }) });
  await told.until(() => told.of("refused").length);
  assert.equal(told.of("refused")[0].code, 4003);
});

test("over the rate limit it cools down", async () => {
  const { told, client } = start({ timings: { coolDown: 0.5, ...QUICK } });
  await told.letIn();
  const asked = Array.from({ length: 30 }, () => client.refreshSectors());
  await Promise.allSettled(asked);
  await told.until(() => told.of("close").length);
  const [{ code, retryIn }] = told.of("close");
  assert.equal(code, 4029);
  assert.ok(retryIn >= 0.5 && retryIn <= 1, `${retryIn}`);
  await told.letIn(2);
});

test("one too many is turned away with 1013, and let in when there is room", async () => {
  const full = new Gateway({ WS_MAX_CONNECTIONS_PER_USER: "1" });
  await full.start();
  try {
    const first = start({ url: full.url("waiter") });
    await first.told.letIn();
    const second = start({ url: full.url("waiter"), timings: QUICK });
    await second.told.until(() => second.told.of("close").length >= 2);
    assert.equal(second.told.of("close")[0].code, 1013);
    first.client.close();
    await second.told.letIn();
  } finally {
    await full.stop("SIGTERM");
  }
});

test("a place that was forgotten is told as a gap", async () => {
  const { told } = start({ timings: QUICK });
  await told.letIn();
  await gateway.stop("SIGKILL");
  await publish({ id: "lost" });
  await publish({ id: "kept" });
  await command("XTRIM", STREAM, "MAXLEN", "1");
  await gateway.start();
  await told.letIn(2);
  await told.until(() => told.of("gap").length);
  assert.deepEqual(told.of("gap"), ["not_recovered"]);
});

test("entries that were taken away unread are told as a gap", async () => {
  const { told } = start();
  await told.letIn();
  process.kill(gateway.pid, "SIGSTOP");
  // The first may be read already: Redis answers whoever waits for it.
  for (const id of ["read", "taken away", "left"]) await publish({ id });
  await command("XTRIM", STREAM, "MAXLEN", "1");
  process.kill(gateway.pid, "SIGCONT");
  await told.until(() => told.of("gap").length);
  assert.deepEqual(told.of("gap"), ["lost"]);
});

test("the token is renewed in band, and the connection outlives the first one", async () => {
  const now = Math.floor(Date.now() / 1000);
  const lives = [4, 600];
  const { told } = start({ token: () => staffToken({ exp: now + (lives.shift() ?? 600) }) });
  await told.letIn();
  await sleep((now + 5) * 1000 - Date.now());
  await publish({ id: "after the first token's life" });
  await told.until(() => ids(told).length);
  assert.equal(lives.length, 0);
  assert.deepEqual(told.of("close"), []);
});

test("a gateway that hangs is noticed when the tab is shown, and resumed on when it is back", async () => {
  const page = new FakePage();
  const timings = { ...QUICK, shortPatience: 0.3, connect: 0.5 };
  const { told, client } = start({ page, timings });
  await told.letIn();
  process.kill(gateway.pid, "SIGSTOP");
  try {
    page.show(true);
    await told.until(() => told.of("close").length);
    assert.equal(told.of("close")[0].reason, "no answer to a ping");
    await publish({ id: "meanwhile" });
  } finally {
    process.kill(gateway.pid, "SIGCONT");
  }
  await told.until(() => ids(told).length);
  assert.equal(client.state, "open");
  assert.deepEqual(ids(told), ["meanwhile"]);
});

test("a tab that is shown again keeps a socket that lives", async () => {
  const page = new FakePage();
  const { told } = start({ page, timings: { shortPatience: 1 } });
  await told.letIn();
  page.show(false);
  page.show(true);
  await sleep(1200);
  assert.deepEqual(told.of("close"), []);
});

test("offline it tries seldom, online it resumes at once", async () => {
  const page = new FakePage();
  const { told, client } = start({ page, timings: QUICK });
  await told.letIn();
  page.network(false);
  await gateway.stop("SIGKILL");
  await told.until(() => client.state === "offline");
  await publish({ id: "while offline" });
  await gateway.start();
  await sleep(600);
  assert.equal(client.state, "offline");
  page.network(true);
  await told.until(() => ids(told).length);
  assert.deepEqual(ids(told), ["while offline"]);
});

test("it says something as often as a gateway with little patience asks", async () => {
  const impatient = new Gateway({ WS_HEARTBEAT_TIMEOUT: "2", WS_CLEANUP_INTERVAL: "0.5" });
  await impatient.start();
  try {
    const { told } = start({ url: impatient.url("waiter") });
    await told.letIn();
    await sleep(3500);
    assert.deepEqual(told.of("close"), []);
  } finally {
    await impatient.stop("SIGTERM");
  }
});

test("a page has one socket to a URL", async () => {
  const page = new FakePage();
  const first = start({ page });
  await first.told.letIn();
  const second = start({ page });
  await second.told.letIn();
  assert.equal(first.client.state, "closed");
  while ((await connections(gateway)) !== 1) await sleep(20);
});

test("sectors are looked up when asked", async () => {
  const { told, client } = start();
  await told.letIn();
  assert.deepEqual(await client.refreshSectors(), [5]);
});
