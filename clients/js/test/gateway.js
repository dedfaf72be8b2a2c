/**
 * A real gateway for the tests: a process that can be killed and started again, tokens for it, and a
 * function to publish. tests/clients/run.py sets the address of Redis.
 */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createHmac, randomUUID } from "node:crypto";
import { once } from "node:events";
import { mkdtemp, writeFile } from "node:fs/promises";
import { createConnection, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

const { TEST_REDIS_URL, TEST_PYTHON, TEST_JWT_SECRET, TEST_TABLE_SECRET } = process.env;
assert(TEST_REDIS_URL && TEST_PYTHON && TEST_JWT_SECRET && TEST_TABLE_SECRET, "use tests/clients/run.py");
const redis = new URL(TEST_REDIS_URL);

/** A stream for this test file: Node runs several test files at a time, each in a process. */
export const STREAM = `events:${process.pid}`;

/** @param {object} claims @param {string} secret */
const sign = (claims, secret) => {
  /** @param {object} part */
  const encode = (part) => Buffer.from(JSON.stringify(part)).toString("base64url");
  const text = `${encode({ alg: "HS256", typ: "JWT" })}.${encode(claims)}`;
  return `${text}.${createHmac("sha256", secret).update(text).digest("base64url")}`;
};

const now = () => Math.floor(Date.now() / 1000);

/** A token of a waiter; no two are the same. @param {Record<string, unknown>} [claims] */
export const staffToken = (claims) =>
  sign(
    {
      sub: "21",
      tenant_id: 1,
      branch_ids: [1],
      roles: ["WAITER"],
      sector_ids: [5],
      iat: now(),
      exp: now() + 600,
      jti: randomUUID(),
      ...claims,
    },
    /** @type {string} */ (TEST_JWT_SECRET),
  );

export const tableToken = () =>
  sign(
    { session_id: 456, table_id: 10, branch_id: 1, tenant_id: 1, iat: now(), exp: now() + 600 },
    /** @type {string} */ (TEST_TABLE_SECRET),
  );

/** One command to Redis (RESP, inline values as bulk strings). @param {string[]} words */
export const command = async (...words) => {
  const socket = createConnection(Number(redis.port), redis.hostname);
  const bulk = words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`);
  socket.write(`*${words.length}\r\n${bulk.join("")}`);
  const [answer] = await once(socket, "data");
  socket.destroy();
  assert.notEqual(String(answer)[0], "-", String(answer));
};

/** Publish a durable event to the stream. @param {Record<string, unknown>} event */
export const publish = (event) =>
  command("XADD", STREAM, "*", "data", JSON.stringify({ ...ROUND, ...event }));

export const ROUND = { type: "ROUND_READY", tenant_id: 1, branch_id: 1, sector_id: 5, session_id: 456 };

const freePort = async () => {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = /** @type {import("node:net").AddressInfo} */ (server.address());
  server.close();
  await once(server, "close");
  return port;
};

/** The number of connections of a gateway. @param {Gateway} gateway @returns {Promise<number>} */
export const connections = async (gateway) =>
  (await (await gateway.http("/ws/health")).json()).connections.total;

/**
 * Wait until the receipts of an event have these numbers.
 *
 * @param {Gateway} gateway @param {string} eventId @param {[number, number, number]} numbers
 */
export const untilReceipts = async (gateway, eventId, numbers) => {
  const token = staffToken({ sub: "9", roles: ["MANAGER"] });
  for (const end = Date.now() + 10_000; ; await sleep(20)) {
    const response = await gateway.http(`/ws/receipts?event_id=${eventId}&token=${token}`);
    const { written, delivered, seen } = await response.json();
    if (`${[written, delivered, seen]}` === `${numbers}`) return;
    assert.ok(Date.now() < end, `${[written, delivered, seen]} instead of ${numbers}`);
  }
};

/** A file of routes in which service calls are tracked. */
export const trackedRoutes = async () => {
  const file = join(await mkdtemp(join(tmpdir(), "routes-")), "routes.toml");
  await writeFile(file, "[routes.SERVICE_CALL_CREATED]\nreceipt = true\n");
  return file;
};

/** One gateway process at a time, always on the same port. */
export class Gateway {
  /** @type {import("node:child_process").ChildProcess | undefined} */
  #process;
  #port = 0;
  /** @type {Record<string, string>} */
  #settings;
  log = "";

  /** @param {Record<string, string>} [settings] */
  constructor(settings = {}) {
    this.#settings = settings;
  }

  /** @param {string} endpoint */
  url(endpoint) {
    return `ws://127.0.0.1:${this.#port}/ws/${endpoint}`;
  }

  /** @param {string} path @param {RequestInit} [options] */
  http(path, options) {
    return fetch(`http://127.0.0.1:${this.#port}${path}`, options);
  }

  get pid() {
    return /** @type {number} */ (this.#process?.pid);
  }

  get #running() {
    return this.#process?.exitCode === null && this.#process.signalCode === null;
  }

  /** Start it, unless it runs, and wait until it is ready. */
  async start() {
    if (this.#running) return;
    this.#port ||= await freePort();
    const env = {
      PATH: process.env.PATH,
      PYTHONPATH: process.env.PYTHONPATH,
      REDIS_URL: TEST_REDIS_URL,
      REDIS_STREAMS: STREAM,
      JWT_SECRET: TEST_JWT_SECRET,
      TABLE_TOKEN_SECRET: TEST_TABLE_SECRET,
      LOG_FORMAT: "json",
      WS_MAX_CONNECTIONS_PER_USER: "1000",
      ...this.#settings,
    };
    const words = ["-m", "trio_gateway", "serve", "--bind", `127.0.0.1:${this.#port}`];
    const started = spawn(/** @type {string} */ (TEST_PYTHON), words, { env });
    this.#process = started;
    for (const stream of [started.stdout, started.stderr]) {
      stream.on("data", (text) => (this.log += text));
    }
    for (;;) {
      assert.equal(started.exitCode, null, this.log);
      const ready = await this.http("/ws/health/ready").catch(() => null);
      if (ready?.ok) return;
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  /** @param {NodeJS.Signals} signal */
  async stop(signal) {
    if (!this.#running) return;
    const stopped = /** @type {import("node:child_process").ChildProcess} */ (this.#process);
    stopped.kill(signal);
    await once(stopped, "exit");
  }
}

/** Records the callbacks that a client calls, in order, and waits for them. */
export class Calls {
  /** @type {{ name: string, detail: any, at: number }[]} */
  all = [];
  #changed = new EventTarget();

  /** @param {string} name @param {unknown} detail */
  #note(name, detail) {
    this.all.push({ name, detail, at: Date.now() / 1000 });
    this.#changed.dispatchEvent(new Event("change"));
  }

  /** Options for connect(). */
  get listeners() {
    /** @param {string} name */
    const note = (name) => (/** @type {unknown} */ detail) => this.#note(name, detail);
    return {
      onEvent: note("event"),
      onGap: note("gap"),
      onMessage: note("message"),
      onState: note("state"),
      onClose: note("close"),
      onRefused: note("refused"),
      onError: note("error"),
    };
  }

  /** @param {string} name @returns {any[]} */
  of(name) {
    return this.all.filter((call) => call.name === name).map((call) => call.detail);
  }

  /**
   * Wait until a condition is true. It is checked after each call of a callback.
   *
   * @param {() => unknown} condition @param {number} [seconds]
   */
  async until(condition, seconds = 10) {
    const signal = AbortSignal.timeout(seconds * 1000);
    while (!condition()) {
      await once(this.#changed, "change", { signal }).catch(() =>
        assert.fail(`not true within ${seconds} s; calls: ${JSON.stringify(this.all)}`),
      );
    }
  }

  /** Wait until the client has been admitted this many times. @param {number} [times] */
  admitted(times = 1) {
    return this.until(() => this.of("state").filter((state) => state === "open").length >= times);
  }
}
