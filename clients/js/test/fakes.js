/** A WebSocket, a page and a clock that the test controls. */

import { mock } from "node:test";

import { connect } from "../../../trio_gateway/static/client.js";

/** @typedef {import("../../../trio_gateway/static/client.js").Options} Options */

/** @param {string | undefined} text */
export const isPing = (text) => text === "ping" || Boolean(text?.startsWith('{"type":"ping"'));

export class FakeWebSocket {
  /** @type {FakeWebSocket[]} */
  static all = [];
  /** @type {string[]} */
  sent = [];
  live = true;
  #opened = false;
  #pongs = 0;
  /** @type {any} */ onopen = null;
  /** @type {any} */ onmessage = null;
  /** @type {any} */ onerror = null;
  /** @type {any} */ onclose = null;

  /** @param {URL} url @param {string[]} protocols */
  constructor(url, protocols) {
    if (protocols.some((each) => /[^\w.~-]/.test(each))) {
      throw new SyntaxError(`the subprotocol ${protocols} is invalid`);
    }
    this.url = url.href;
    this.protocols = protocols;
    FakeWebSocket.all.push(this);
  }

  /** @param {string} text */
  send(text) {
    if (!this.onmessage) throw new Error("sent on a socket that the client had dropped");
    this.sent.push(text);
  }

  close() {
    this.live = false;
  }

  get token() {
    return this.protocols[1].replace("bearer.", "");
  }

  // What the gateway does

  open() {
    this.#opened = true;
    this.onopen?.({});
  }

  /** @param {object} message */
  receive(message) {
    this.onmessage?.({ data: JSON.stringify(message) });
  }

  get pings() {
    return this.sent.filter(isPing);
  }

  /** Answer each ping that has no answer yet. */
  answerPings() {
    while (this.#pongs < this.pings.length) {
      this.#pongs++;
      this.receive({ type: "pong" });
    }
  }

  /** Accept the upgrade and answer the resume. */
  admit({ recovered = true, last_event_id = "0" } = {}) {
    this.open();
    this.receive({ type: "resumed", recovered, count: 0, last_event_id });
  }

  /** Close the socket. Every code but 1006 comes after the upgrade. @param {number} code */
  end(code, reason = "") {
    if (!this.#opened && code !== 1006) this.open();
    this.live = false;
    this.onerror?.({});
    this.onclose?.({ code, reason });
  }

  /** Fail to connect as in Node 22: without a close event. */
  fail() {
    this.live = false;
    this.onerror?.({});
  }
}

/** The part of a window that the client uses. */
export class FakePage extends EventTarget {
  navigator = { onLine: true };
  document = { visibilityState: "visible" };

  /** @param {boolean} onLine */
  network(onLine) {
    this.navigator.onLine = onLine;
    this.dispatchEvent(new Event(onLine ? "online" : "offline"));
  }

  /** @param {boolean} visible */
  show(visible) {
    this.document.visibilityState = visible ? "visible" : "hidden";
    this.dispatchEvent(new Event("visibilitychange"));
  }
}

/** Run all pending callbacks. */
export const settle = () => new Promise((resolve) => setImmediate(resolve));

const STEP = 100; // milliseconds

/** Virtual time: it passes only in `pass` and `sleep`. */
export class Clock {
  #now = 1_790_000_000_000;

  constructor() {
    mock.timers.enable({ apis: ["setTimeout"] });
    mock.method(Date, "now", () => this.#now);
  }

  get seconds() {
    return this.#now / 1000;
  }

  /** @param {number} seconds @param {number} [most] milliseconds in one step */
  async pass(seconds, most = STEP) {
    await settle();
    for (let left = Math.round(seconds * 1000); left > 0; left -= most) {
      const step = Math.min(left, most);
      this.#now += step;
      mock.timers.tick(step);
      await settle();
    }
  }

  /** The device sleeps: time passes, and timers don't run. @param {number} seconds */
  sleep(seconds) {
    this.#now += seconds * 1000;
  }
}

/** Make `Math.random` return this value. @param {number} value */
export const setRandom = (value) => mock.method(Math, "random", () => value);

/** @param {{ exp?: number, iat?: number, jti?: string }} claims */
export const jwt = (claims) => `e30.${Buffer.from(JSON.stringify(claims)).toString("base64url")}.c2ln`;

/** A client on fakes, and the callbacks that it has called, in order. */
export class TestClient {
  /** @type {[string, any][]} */
  calls = [];
  page = new FakePage();

  /** @param {Partial<Options>} [options] */
  constructor(options = {}) {
    /** @param {string} name */
    const note = (name) => (/** @type {any} */ detail) => this.calls.push([name, detail]);
    this.client = connect({
      url: "wss://gateway.example/ws/waiter",
      token: "token",
      page: this.page,
      WebSocket: /** @type {any} */ (FakeWebSocket),
      onEvent: note("event"),
      onGap: note("gap"),
      onState: note("state"),
      onClose: note("close"),
      onRefused: note("refused"),
      onError: note("error"),
      ...options,
    });
  }

  /** The newest socket. */
  get socket() {
    return /** @type {FakeWebSocket} */ (FakeWebSocket.all.at(-1));
  }

  /** The details of the calls of one callback. @param {string} name */
  of(name) {
    return this.calls.filter(([called]) => called === name).map(([, detail]) => detail);
  }
}
