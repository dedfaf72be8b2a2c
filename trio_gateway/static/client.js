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
  offline: 30,
  stable: 10,
};
const NO_ANSWER = 1006; // what a browser says when there was no close frame
const AUTH_FAILED = 4001;
const STOP = new Set([1002, 1003, 1007, 1008, 1009, 4003]);
const LATE = 5; // seconds: a timer that is later than this has slept
const LEAST_PING = 0.5; // seconds between pings, whatever the gateway says: they count towards its rate limit
const RENEW_AT = 0.8; // of what is left of a token's life
const SUPPOSED_LIFE = 75; // seconds, of a token that seems expired and has no iat
const UNSURE = 660; // seconds that a clock may be behind, until something has shown how far it is
const SELDOM = { known: 0.1, unknown: 10 }; // between two renewals: of a token's life; seconds
const OVERDUE = 30; // seconds until the provider is asked again, past the supposed expiry
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

/**
 * What is left of a token's life. The device's clock may be wrong, so it alone never decides: it is
 * used as far as no token has contradicted it.
 */
class Lifetime {
  /** Seconds that the clock is behind; null: nothing has shown it. @type {number | null} */
  #behind = null;

  /**
   * Seconds until a token that the gateway has just accepted expires, rather too few.
   *
   * @param {number | undefined} iat @param {number} expires @param {number} now
   */
  left(iat, expires, now) {
    const whole = iat !== undefined && iat < expires ? expires - iat : SUPPOSED_LIFE;
    if (iat !== undefined) this.#behind = Math.max(this.#behind ?? 0, iat - now); // not issued in the future
    const left = expires - now - (this.#behind ?? 0);
    if (left <= 0) return whole; // it was accepted: the clock is ahead
    if (iat !== undefined) return Math.min(left, whole);
    const unsure = this.#behind === null && left > UNSURE + 60;
    return unsure ? Math.min(left, (left - UNSURE) / RENEW_AT) : left;
  }

  /** The gateway has said that a connection's token expires now. @param {number} expires @param {number} now */
  expired(expires, now) {
    this.#behind = expires - now;
  }
}

const WAKER_AFTER = 5; // seconds that a page must have been hidden
/** What a worker does that wakes a hidden page: browsers hold up the timers of the page, not its own. */
const WAKER = "onmessage = ({ data }) => setTimeout(postMessage, data, 0)";

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
  /** Seconds of that wait. */
  #askedToWait = 0;
  /** The one that holds, or is being tried. */
  #token = "";
  /** Sent to renew it, and not answered yet: a refusal may then be about either. */
  #offered = "";
  /** The one that was presented and refused, for sure. */
  #refused = "";
  /** A token was refused since one was last accepted. */
  #unwanted = false;
  #why = "";
  /** When the gateway will end the connection, unix time by its clock; 0 if nobody knows. */
  #expires = 0;
  /** Seconds from the planned renewal to the token's end. */
  #left = 0;
  #lifetime = new Lifetime();
  /** Let in while the browser says that there is no network: it does not know. */
  #networkUnknown = false;
  #pingEvery;
  #pinged = false;
  #lastEventId;
  /** @type {Set<string>} */
  #seen = new Set();
  /** @type {{ resolve: (sectors: number[]) => void, reject: (error: Error) => void }[]} */
  #asked = [];
  /** @type {Map<string, { due: number, run: () => void, id: ReturnType<typeof setTimeout> }>} */
  #timers = new Map();
  /** Wakes the page while it is hidden. @type {Worker | null} */
  #waker = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #wakerStart;
  #listening = new AbortController();

  /** @param {Options} options */
  constructor(options) {
    super();
    this.#options = options;
    this.#timings = { ...TIMINGS, ...options.timings };
    this.#pingEvery = this.#timings.ping;
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

  /** @param {object | string} message */
  send(message) {
    if (this.#state !== "open") throw new Error(`not connected: ${this.#state}`);
    this.#socket?.send(typeof message === "string" ? message : JSON.stringify(message));
  }

  reconnect() {
    if (this.#ended) return;
    const wait = this.#mustWait;
    if (wait > 0) this.#wait(wait);
    else this.#connect();
  }

  close() {
    this.#end("closed");
    this.#listening.abort();
  }

  #listen() {
    const { onEvent, onGap, onMessage, onState, onClose, onRefused, onError } = this.#options;
    const options = { signal: this.#listening.signal };
    /** @param {string} name @param {((detail: any) => void) | undefined} call */
    const on = (name, call) => {
      if (!call) return;
      const listener = /** @param {any} told */ (told) => call(told.detail);
      this.addEventListener(name, listener, options);
    };
    on("event", onEvent && (({ event, text }) => onEvent(event, text)));
    on("gap", onGap);
    on("message", onMessage && (({ message, text }) => onMessage(message, text)));
    on("state", onState);
    on("close", onClose);
    on("refused", onRefused);
    on("error", onError);
    /** @param {string} name @param {() => void} call */
    const watch = (name, call) => this.#page?.addEventListener(name, call, options);
    watch("offline", () => {
      this.#networkUnknown = false;
      this.#look();
    });
    watch("online", () => this.#look());
    watch("pageshow", () => this.#look());
    watch("visibilitychange", () => {
      this.#keepAwake();
      if (!this.#hidden) this.#look();
    });
    this.#keepAwake();
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

  /** One timer of a name at most. @param {string} name @param {() => void} call @param {number} wait */
  #timer(name, call, wait) {
    this.#stop(name);
    const run = () => {
      this.#timers.delete(name);
      call();
    };
    this.#timers.set(name, { due: seconds() + wait, run, id: after(run, wait) });
    this.#waker?.postMessage(Math.min(wait * 1000 + 10, LONGEST_TIMER));
  }

  /** @param {string} name */
  #stop(name) {
    clearTimeout(this.#timers.get(name)?.id);
    this.#timers.delete(name);
  }

  /** Run the timers that are due, which the browser may hold up while the page is hidden. */
  #runDue() {
    for (const [name, { due, run }] of this.#timers) {
      if (due > seconds()) continue;
      this.#stop(name);
      run();
    }
  }

  get #hidden() {
    return this.#page?.document?.visibilityState === "hidden";
  }

  /** Have a worker while the page is hidden, if it is for more than a moment: it may be closing. */
  #keepAwake() {
    clearTimeout(this.#wakerStart);
    if (this.#hidden && !this.#ended) {
      if (!this.#waker) this.#wakerStart = after(() => this.#startWaker(), WAKER_AFTER);
      return;
    }
    this.#waker?.terminate();
    this.#waker = null;
  }

  /** Without one, or if the page's policy forbids it (`worker-src blob:`), what is heard wakes the page. */
  #startWaker() {
    if (this.#waker || typeof Worker !== "function") return;
    const url = URL.createObjectURL(new Blob([WAKER], { type: "text/javascript" }));
    const loaded = () => URL.revokeObjectURL(url); // not earlier: older Safaris would not load it
    try {
      const waker = new Worker(url);
      waker.onmessage = () => {
        loaded();
        this.#runDue();
      };
      waker.onerror = () => {
        loaded();
        if (this.#waker === waker) this.#waker = null;
      };
      waker.postMessage(0);
      for (const { due } of this.#timers.values()) {
        waker.postMessage(Math.max(0, due - seconds()) * 1000 + 10);
      }
      this.#waker = waker;
    } catch {
      loaded();
    }
  }

  // An attempt: token, socket, let in

  async #connect() {
    this.#drop();
    const attempt = this.#attempt;
    this.#become("connecting");
    if (attempt !== this.#attempt) return; // a listener closed it
    this.#timer("connect", () => this.#lost(NO_ANSWER, "not connected in time"), this.#timings.connect);
    let token;
    try {
      token = await this.#ask(this.#unwanted);
    } catch (error) {
      if (attempt !== this.#attempt) return;
      this.#tell("error", error);
      if (attempt === this.#attempt) this.#lost(NO_ANSWER, "no token: the provider failed");
      return;
    }
    if (attempt !== this.#attempt) return;
    if (!token) return this.#refuse(AUTH_FAILED, "no token");
    if (token === this.#refused) return this.#refuse(AUTH_FAILED, this.#why);
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
    this.#offered = "";
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
    this.#stop("connect");
    this.#openSince = seconds();
    this.#askedToWait = 0;
    this.#refused = "";
    this.#unwanted = false;
    this.#networkUnknown = this.#page?.navigator?.onLine === false;
    this.#pingEvery = this.#timings.ping;
    this.#pingLater();
    this.#renewLater(false);
    this.#say({ type: "intervals" });
    this.#become("open");
  }

  // What the gateway says

  /** @param {unknown} data */
  #hear(data) {
    if (this.#pinged) this.#pingLater();
    if (this.#hidden) queueMicrotask(() => this.#runDue());
    const text = String(data);
    let message = null;
    try {
      message = JSON.parse(text);
    } catch {
      // a word, as the answer to the plain form of a message
    }
    // Events name their tenant, the gateway's own messages don't: whatever types there are.
    if (message?.tenant_id !== undefined) return this.#event(message, text);
    switch (message?.type) {
      case "resumed":
        if (typeof message.last_event_id === "string") this.#lastEventId = message.last_event_id;
        this.#letIn();
        if (!message.recovered) this.#tell("gap", "not_recovered");
        break;
      case "gap":
        this.#tell("gap", "lost");
        break;
      case "auth_ok":
        if (!this.#offered) break; // a second answer
        this.#token = this.#offered;
        this.#offered = "";
        this.#expires = message.expires_at;
        this.#renewLater(true);
        break;
      case "sectors_updated":
        this.#answerAsked(message.sector_ids);
        break;
      case "intervals":
        this.#hearIntervals(message);
        break;
    }
    this.#tell("message", { message, text });
  }

  /** @param {{ heartbeat_timeout?: unknown, receive_timeout?: unknown }} message */
  #hearIntervals({ heartbeat_timeout, receive_timeout }) {
    const silence = Math.min(Number(heartbeat_timeout), Number(receive_timeout));
    if (!(silence > 0)) return;
    this.#pingEvery = Math.min(this.#timings.ping, Math.max(LEAST_PING, silence / 2));
    if (!this.#pinged) this.#pingLater();
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
    this.#stop("sectors");
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
    this.#stop("pong");
    const due = seconds() + this.#pingEvery;
    const ping = () => this.#ping(this.#slept(due));
    this.#timer("ping", ping, this.#pingEvery);
  }

  /** @param {boolean} hurry */
  #ping(hurry) {
    const patience = hurry ? this.#timings.shortPatience : this.#timings.patience;
    const due = seconds() + patience;
    this.#pinged = true;
    this.#stop("ping");
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
    const wait = this.#mustWait;
    if (!this.#offline) {
      if (wait > 0) this.#wait(wait);
      else this.#connect();
    } else if (this.#state === "waiting") {
      this.#wait(Math.max(wait, this.#seldom()));
    }
  }

  /** Seconds that the gateway still wants us to wait; not more if the clock was set back. */
  get #mustWait() {
    return Math.min(this.#notBefore - seconds(), this.#askedToWait);
  }

  get #offline() {
    return !this.#networkUnknown && this.#page?.navigator?.onLine === false;
  }

  /** The browser may be wrong about the network (a VPN, a virtual adapter), so attempts go on. */
  #seldom() {
    return this.#timings.offline * (1 + Math.random());
  }

  // The token's life

  /** @param {boolean} renewed */
  #renewLater(renewed) {
    if (!this.#expires || typeof this.#options.token !== "function") return;
    const { iat } = claims(this.#token);
    const left = this.#lifetime.left(iat, this.#expires, seconds());
    // A token that is new and seems to be at its end shows that the clock is wrong.
    const seldom = iat === undefined ? SELDOM.unknown : SELDOM.known * (this.#expires - iat);
    this.#left = left;
    this.#renewIn(Math.max(1, renewed ? seldom : 0, RENEW_AT * left));
  }

  /** @param {number} wait */
  #renewIn(wait) {
    this.#left -= wait;
    this.#timer("renew", () => this.#renew(), wait);
  }

  async #renew() {
    const attempt = this.#attempt;
    // Also if nothing comes of it: the old one holds for a while.
    this.#renewIn(this.#left > 0 ? Math.max(1, RENEW_AT * this.#left) : OVERDUE);
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
    for (const name of this.#timers.keys()) this.#stop(name);
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
    const wasOpen = this.#state === "open";
    const held = wasOpen && seconds() - this.#openSince >= this.#timings.stable;
    if (held) this.#failures = 0;
    this.#drop();
    const next = afterClose(code);
    if (next === "stop") return this.#refuse(code, reason);
    if (next === "renew") this.#blame(reason, wasOpen);
    // The gateway has spread its clients already.
    let asked = hint(reason);
    if (next === "cool down") asked ??= this.#timings.coolDown * (1 + Math.random());
    this.#askedToWait = asked ?? 0;
    this.#notBefore = seconds() + this.#askedToWait;
    let wait = asked ?? this.#backOff(next === "renew");
    if (this.#offline) wait = Math.max(wait, this.#seldom());
    const attempt = this.#attempt;
    this.#tell("close", { code, reason, retryIn: wait });
    if (attempt === this.#attempt) this.#wait(wait);
  }

  /**
   * A token counts as refused only if the answer was about it for sure. Else whichever comes next from
   * the provider is presented, and judged.
   *
   * @param {string} reason @param {boolean} wasOpen
   */
  #blame(reason, wasOpen) {
    this.#unwanted = true;
    this.#why = reason;
    this.#refused = this.#offered ? "" : this.#token;
    if (wasOpen && !this.#offered && this.#expires && reason.includes("expired")) {
      this.#lifetime.expired(this.#expires, seconds());
    }
  }

  /** Anything between nothing and a bound that doubles, so that many do not come back as one. */
  #backOff(atOnce = false) {
    const { backOff, longest } = this.#timings;
    const bound = Math.min(longest, backOff * 2 ** this.#failures);
    return this.#failures++ || !atOnce ? Math.random() * bound : 0;
  }

  /** @param {number} wait */
  #wait(wait) {
    this.#timer("retry", () => this.#connect(), wait);
    this.#become(this.#offline ? "offline" : "waiting");
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
    this.#keepAwake();
  }
}

/** @type {typeof import("./client.d.ts").connect} */
export const connect = (options) => new Connection(options);
