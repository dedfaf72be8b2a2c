// @ts-self-types="./client.d.ts"
/**
 * A client of trio-gateway for browsers and Node. What is exported is described in client.d.ts.
 *
 * @import { Ending, GatewayEvent, Options, Page, State, Timings } from "./client.d.ts"
 */

/** @type {Timings} */
const TIMINGS = {
  ping: 25,
  patience: 10,
  shortPatience: 3,
  connect: 15,
  backOff: 1,
  longest: 30,
  coolDown: 30,
  stable: 10,
};
const NO_ANSWER = 1006; // what a browser says when there was no close frame
const AUTH_FAILED = 4001;
const STOP = new Set([1002, 1003, 1007, 1008, 1009, 4003]);
const LATE = 5; // seconds: a timer that is later than this has slept
const REMEMBERED = 1000; // event ids
const LONGEST_TIMER = 2 ** 31 - 1; // milliseconds; what is longer fires at once

/** @type {typeof import("./client.d.ts").afterClose} */
export const afterClose = (code) => {
  if (STOP.has(code)) return "stop";
  if (code === AUTH_FAILED) return "renew";
  return code === 4029 ? "cool down" : "back off";
};

/**
 * The `retry in 3.2s` of a close reason.
 *
 * @param {string} reason
 */
const hint = (reason) => {
  const found = /\bretry in (\d+(?:\.\d+)?)s/.exec(reason);
  return found ? Number(found[1]) : null;
};

/**
 * What a JWT says of its own life, unchecked; nothing if it is no JWT.
 *
 * @param {string} token
 * @returns {{ exp?: number, iat?: number }}
 */
const claims = (token) => {
  try {
    const text = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const { exp, iat } = JSON.parse(atob(text));
    return {
      exp: typeof exp === "number" ? exp : undefined,
      iat: typeof iat === "number" ? iat : undefined,
    };
  } catch {
    return {};
  }
};

/**
 * @param {() => void} call
 * @param {number} seconds
 */
const after = (call, seconds) => setTimeout(call, Math.min(seconds * 1000, LONGEST_TIMER));

const seconds = () => Date.now() / 1000;

/** @type {WeakMap<Page, Map<string, Connection>>} */
const pages = new WeakMap();

class Connection extends EventTarget {
  /** @type {Options} */
  #options;
  /** @type {Timings} */
  #timings;
  /** @type {URL} */
  #url;
  #WebSocket;
  /** @type {Page | null} */
  #page;
  /** @type {State} */
  #state = "connecting";
  /** @type {WebSocket | null} */
  #socket = null;
  /** Counts the attempts, so that what an earlier one waited for is known to be stale. */
  #attempt = 0;
  /** Attempts since a connection last held. */
  #failures = 0;
  #openSince = 0;
  /** Not before this, whatever the device says: the gateway asked for it. */
  #notBefore = 0;
  /** The one that holds, or is being tried. */
  #token = "";
  /** Sent to renew it, and not answered yet. */
  #offered = "";
  #refused = "";
  /** When the gateway will end the connection, unix time; 0 if nobody knows. */
  #expires = 0;
  #pinged = false;
  #lastEventId;
  /** @type {Set<string>} */
  #seen = new Set();
  /** @type {{ resolve: (sectors: number[]) => void, reject: (error: Error) => void }[]} */
  #asked = [];
  /** Each of them one timer at most. @type {Record<string, ReturnType<typeof setTimeout>>} */
  #timers = {};
  #listening = new AbortController();

  /** @param {Options} options */
  constructor(options) {
    super();
    this.#options = options;
    this.#timings = { ...TIMINGS, ...options.timings };
    this.#lastEventId = options.lastEventId ?? "";
    this.#url = new URL(options.url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace(/^http/, "ws");
    this.#url.hash = "";
    this.#WebSocket = options.WebSocket ?? globalThis.WebSocket;
    if (!this.#WebSocket) throw new TypeError("no WebSocket here: Node has one since version 22");
    for (const name of ["token", "table_token", "ticket"]) {
      if (this.#url.searchParams.has(name)) {
        throw new TypeError(`no ${name} in the URL: it would stand in logs; use the option token`);
      }
    }
    const here = /** @type {any} */ (globalThis);
    const page = typeof here.addEventListener === "function" ? here : null;
    this.#page = options.page === undefined ? page : options.page;
    this.#listen();
    if (this.#page) this.#take(this.#page);
    this.#connect(); // tells nothing before it has waited, so listeners can be added first
  }

  get state() {
    return this.#state;
  }

  get lastEventId() {
    return this.#lastEventId;
  }

  /** @returns {Promise<number[]>} */
  refreshSectors() {
    return new Promise((resolve, reject) => {
      if (this.#state !== "open") {
        reject(new Error(`not connected: ${this.#state}`));
        return;
      }
      this.#asked.push({ resolve, reject });
      this.#say({ type: "refresh_sectors" });
      this.#timer("sectors", () => this.#answerAsked(null), this.#timings.patience);
    });
  }

  close() {
    this.#end("closed");
    this.#listening.abort();
  }

  #listen() {
    const { onEvent, onGap, onState, onClose, onRefused, onError } = this.#options;
    const options = { signal: this.#listening.signal };
    /** @param {string} name @param {((detail: any) => void) | undefined} call */
    const on = (name, call) => {
      if (!call) return;
      const listener = /** @param {any} told */ (told) => call(told.detail);
      this.addEventListener(name, listener, options);
    };
    on("event", onEvent && (({ event, text }) => onEvent(event, text)));
    on("gap", onGap);
    on("state", onState);
    on("close", onClose);
    on("refused", onRefused);
    on("error", onError);
    /** @param {string} name @param {() => void} call */
    const watch = (name, call) => this.#page?.addEventListener(name, call, options);
    watch("offline", () => this.#look());
    watch("online", () => this.#look());
    watch("pageshow", () => this.#look());
    watch("visibilitychange", () => {
      if (this.#page?.document?.visibilityState !== "hidden") this.#look();
    });
  }

  /** @param {Page} page */
  #take(page) {
    const connections = pages.get(page) ?? new Map();
    pages.set(page, connections);
    connections.get(this.#key)?.close();
    connections.set(this.#key, this);
  }

  get #ended() {
    return this.#listening.signal.aborted;
  }

  get #key() {
    return this.#url.origin + this.#url.pathname;
  }

  /** @param {string} name @param {unknown} detail */
  #tell(name, detail) {
    if (!this.#ended) this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  /** @param {State} state */
  #become(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.#tell("state", state);
  }

  /** @param {string} name @param {() => void} call @param {number} seconds */
  #timer(name, call, seconds) {
    clearTimeout(this.#timers[name]);
    this.#timers[name] = after(call, seconds);
  }

  // An attempt: token, socket, let in

  async #connect() {
    this.#drop();
    const attempt = this.#attempt;
    this.#become("connecting");
    if (attempt !== this.#attempt) return; // a listener closed it
    this.#timer("connect", () => this.#lost(NO_ANSWER, "not connected in time"), this.#timings.connect);
    const refused = this.#refused !== "";
    let token;
    try {
      token = await this.#ask(refused);
    } catch (error) {
      if (attempt !== this.#attempt) return;
      this.#tell("error", error);
      if (attempt === this.#attempt) this.#lost(NO_ANSWER, "no token: the provider failed");
      return;
    }
    if (attempt !== this.#attempt) return;
    if (!token) return this.#refuse(AUTH_FAILED, "no token");
    if (token === this.#refused) return this.#refuse(AUTH_FAILED, "the same token again");
    this.#open(token);
  }

  /** @param {boolean} refused */
  async #ask(refused) {
    const { token } = this.#options;
    return typeof token === "function" ? await token({ refused }) : token;
  }

  /** @param {string} token */
  #open(token) {
    let socket;
    try {
      socket = new this.#WebSocket(this.#url, ["gateway.v1", `bearer.${token}`]);
    } catch (error) {
      // The token is no subprotocol, or the page may not: waiting mends neither.
      return this.#refuse(NO_ANSWER, String(error).replaceAll(token, "…"));
    }
    this.#token = token;
    this.#expires = claims(token).exp ?? 0;
    this.#socket = socket;
    // Node 22 says no more than this of a connection that it could not make.
    socket.onerror = () => this.#lost(NO_ANSWER, "");
    socket.onopen = () => {
      socket.onerror = null; // from here on the close event follows, and brings the code
      this.#say({ type: "resume", last_event_id: this.#lastEventId });
    };
    socket.onmessage = ({ data }) => this.#hear(data);
    socket.onclose = ({ code, reason }) => this.#lost(code, reason);
  }

  #letIn() {
    clearTimeout(this.#timers.connect);
    this.#openSince = seconds();
    this.#refused = "";
    this.#pingLater();
    this.#renewLater();
    this.#become("open");
  }

  // What the gateway says

  /** @param {unknown} data */
  #hear(data) {
    if (this.#pinged) this.#pingLater();
    const text = String(data);
    let message;
    try {
      message = JSON.parse(text);
    } catch {
      return;
    }
    // Events name their tenant, the gateway's own messages don't: whatever types there are.
    if (message?.tenant_id !== undefined) return this.#event(message, text);
    switch (message?.type) {
      case "resumed":
        this.#lastEventId = message.last_event_id;
        this.#letIn();
        if (!message.recovered) this.#tell("gap", "not_recovered");
        break;
      case "gap":
        this.#tell("gap", "lost");
        break;
      case "auth_ok":
        this.#token = this.#offered;
        this.#expires = message.expires_at;
        this.#renewLater();
        break;
      case "sectors_updated":
        this.#answerAsked(message.sector_ids);
        break;
    }
  }

  /** @param {GatewayEvent} event @param {string} text */
  #event(event, text) {
    const id = event.event_id;
    if (typeof id === "string") {
      if (this.#seen.has(id)) return;
      this.#seen.add(id);
      if (this.#seen.size > REMEMBERED) {
        for (const oldest of this.#seen) {
          this.#seen.delete(oldest);
          break;
        }
      }
      this.#lastEventId = id;
    }
    this.#tell("event", { event, text });
  }

  /** @param {number[] | null} sectors */
  #answerAsked(sectors) {
    clearTimeout(this.#timers.sectors);
    for (const { resolve, reject } of this.#asked.splice(0)) {
      if (sectors) resolve(sectors);
      else reject(new Error("the gateway did not say the sectors"));
    }
  }

  /** @param {object} message */
  #say(message) {
    this.#socket?.send(JSON.stringify(message));
  }

  // Whether the socket lives

  /**
   * Set from the answer to a ping, not from the timer that sent it: browsers let chains of timers in
   * a hidden tab fire once a minute, which is too late for the gateway's 60 seconds.
   */
  #pingLater() {
    this.#pinged = false;
    clearTimeout(this.#timers.pong);
    const due = seconds() + this.#timings.ping;
    const ping = () => this.#ping(this.#slept(due));
    this.#timer("ping", ping, this.#timings.ping);
  }

  /** @param {boolean} hurry */
  #ping(hurry) {
    const patience = hurry ? this.#timings.shortPatience : this.#timings.patience;
    const due = seconds() + patience;
    this.#pinged = true;
    clearTimeout(this.#timers.ping);
    this.#timer(
      "pong",
      () => {
        // After a sleep the answer may lie there, not heard yet.
        if (this.#slept(due)) this.#ping(true);
        else this.#lost(NO_ANSWER, "no answer to a ping");
      },
      patience,
    );
    this.#socket?.send("ping");
  }

  /** @param {number} due */
  #slept(due) {
    return seconds() - due > LATE;
  }

  /** The tab is seen again, or the network came or went: is the socket dead, or the wait over? */
  #look() {
    if (this.#state === "open") this.#ping(true);
    if (this.#state !== "waiting" && this.#state !== "offline") return;
    const wait = this.#notBefore - seconds();
    if (this.#offline || wait > 0) this.#wait(wait);
    else this.#connect();
  }

  get #offline() {
    return this.#page?.navigator?.onLine === false;
  }

  // The token's life

  #renewLater() {
    const { exp, iat } = claims(this.#token);
    if (!this.#expires) return;
    let left = this.#expires - seconds();
    // A clock that is ahead finds every token expired; then the token's own two times must do.
    if (left <= 0) left = exp && iat ? exp - iat : 300;
    this.#timer("renew", () => this.#renew(), Math.max(1, 0.8 * left));
  }

  async #renew() {
    const attempt = this.#attempt;
    // Also if nothing comes of it: the old one holds for a while.
    this.#renewLater();
    try {
      const token = await this.#ask(false);
      if (attempt !== this.#attempt || !token || token === this.#token) return;
      this.#offered = token;
      this.#say({ type: "auth", token });
    } catch (error) {
      if (attempt === this.#attempt) this.#tell("error", error);
    }
  }

  // The end of a socket, and what comes after

  /** Forget the socket and all that waits for it. */
  #drop() {
    this.#attempt++;
    for (const timer of Object.values(this.#timers)) clearTimeout(timer);
    this.#pinged = false;
    const socket = this.#socket;
    this.#socket = null;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onerror = socket.onclose = null;
    // Its close event may be a minute away if the network is gone.
    socket.close(1000);
    this.#answerAsked(null);
  }

  /** @param {number} code @param {string} reason */
  #lost(code, reason) {
    const held = this.#state === "open" && seconds() - this.#openSince >= this.#timings.stable;
    if (held) this.#failures = 0;
    this.#drop();
    const next = afterClose(code);
    if (next === "stop") return this.#refuse(code, reason);
    if (next === "renew") this.#refused = this.#token;
    // The gateway has spread its clients already.
    const asked = next === "cool down" ? this.#timings.coolDown * (1 + Math.random()) : hint(reason);
    this.#notBefore = asked === null ? 0 : seconds() + asked;
    const wait = asked ?? this.#backOff(next === "renew");
    const attempt = this.#attempt;
    const retryIn = this.#offline ? null : wait;
    this.#tell("close", { code, reason, retryIn });
    if (attempt === this.#attempt) this.#wait(wait);
  }

  /** Anything between nothing and a bound that doubles, so that many do not come back as one. */
  #backOff(atOnce = false) {
    const { backOff, longest } = this.#timings;
    const bound = Math.min(longest, backOff * 2 ** this.#failures);
    return this.#failures++ || !atOnce ? Math.random() * bound : 0;
  }

  /** @param {number} wait */
  #wait(wait) {
    clearTimeout(this.#timers.retry);
    if (this.#offline) return this.#become("offline");
    this.#timer("retry", () => this.#connect(), wait);
    this.#become("waiting");
  }

  /** @param {number} code @param {string} reason */
  #refuse(code, reason) {
    const attempt = this.#attempt;
    const ending = { code, reason, retryIn: null };
    this.#tell("close", ending);
    if (attempt !== this.#attempt) return;
    this.#end("refused", ending);
  }

  /** @param {State} state @param {Ending} [ending] */
  #end(state, ending) {
    if (this.#state === "refused" || this.#state === "closed") return;
    this.#drop();
    // First of all: a listener may connect again.
    const connections = this.#page && pages.get(this.#page);
    if (connections?.get(this.#key) === this) connections.delete(this.#key);
    this.#become(state);
    if (ending) this.#tell("refused", ending);
    this.#listening.abort();
  }
}

/** @type {typeof import("./client.d.ts").connect} */
export const connect = (options) => new Connection(options);
