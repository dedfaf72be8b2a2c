// @ts-self-types="./client.d.ts"
/**
 * A client of trio-gateway for browsers and Node. client.d.ts describes the exports.
 *
 * @import { Ending, GatewayEvent, Options, Page, Presence, PresentSession, PresentUser, State, Timings } from "./client.d.ts"
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
const ABNORMAL_CLOSURE = 1006; // RFC 6455, 7.1.5: no close frame was received
const AUTH_FAILED = 4001;
const STOP = new Set([1002, 1003, 1007, 1008, 1009, 4003]);
const SLEEP_THRESHOLD = 5; // seconds; a timer that fires later than this shows that the device slept
const MIN_PING_INTERVAL = 0.5; // seconds, even if the gateway asks for less: its rate limit counts pings
const RENEW_AT = 0.8; // fraction of a token's remaining lifetime
const ASSUMED_LIFETIME = 75; // seconds; for a token without iat that seems to be expired
const MAX_CLOCK_ERROR = 660; // seconds; how far a clock may be behind, until the error has been measured
/** After a renewal, with and without a known lifetime: a fraction of it; seconds. */
const MIN_RENEWAL_INTERVAL = { known: 0.1, unknown: 10 };
const RENEWAL_RETRY = 30; // seconds between calls of the provider, after the assumed expiry
const REMEMBERED_IDS = 1000; // event ids
const ACK_DELAY = 0.15; // seconds in which events are collected for one ack; it is due after 0.2
const MOST_ACKS = 100; // ids to be acknowledged; more than one only if events were escalated
const SEEN_INTERVAL = 0.1; // seconds between two messages, because the gateway's rate limit counts them
const SEEN_AT_END = 10; // such messages that are sent at once when the connection is closed
const EVENT_ID = /^(\d+)-(\d+)-([0-9a-f]{4})$/; // milliseconds, sequence number, tag of the stream
const MAX_TIMER = 2 ** 31 - 1; // milliseconds; browsers run longer timers at once

/** @type {typeof import("./client.d.ts").afterClose} */
export const afterClose = (code) => {
  if (STOP.has(code)) return "stop";
  if (code === AUTH_FAILED) return "renew";
  return code === 4029 ? "cool down" : "back off";
};

/**
 * Seconds to wait, from a close reason such as `retry in 3.2s`; null if it contains none.
 *
 * @param {string} reason
 */
const retryHint = (reason) => {
  const found = /\bretry in (\d+(?:\.\d+)?)s/.exec(reason);
  return found ? Number(found[1]) : null;
};

/**
 * The `exp` and `iat` of a JWT, not verified; empty if the token is not a JWT.
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
const after = (call, seconds) => setTimeout(call, Math.min(seconds * 1000, MAX_TIMER));

const seconds = () => Date.now() / 1000;

/**
 * Computes the remaining lifetime of tokens. The device's clock may be wrong: it is corrected by what
 * the times in accepted and expired tokens show.
 */
class Lifetime {
  /** Seconds that the clock is behind; null if unknown. @type {number | null} */
  #clockBehind = null;

  /**
   * Seconds until a token that the gateway has just accepted expires. Too short rather than too long.
   *
   * @param {number | undefined} iat @param {number} expires @param {number} now
   */
  remaining(iat, expires, now) {
    const whole = iat !== undefined && iat < expires ? expires - iat : ASSUMED_LIFETIME;
    // No token is issued in the future.
    if (iat !== undefined) this.#clockBehind = Math.max(this.#clockBehind ?? 0, iat - now);
    const left = expires - now - (this.#clockBehind ?? 0);
    if (left <= 0) return whole; // accepted, so the clock is ahead
    if (iat !== undefined) return Math.min(left, whole);
    const uncertain = this.#clockBehind === null && left > MAX_CLOCK_ERROR + 60;
    return uncertain ? Math.min(left, (left - MAX_CLOCK_ERROR) / RENEW_AT) : left;
  }

  /**
   * The gateway has closed a connection because its token has just expired.
   *
   * @param {number} expires @param {number} now
   */
  expired(expires, now) {
    this.#clockBehind = expires - now;
  }
}

/** The newest event of each stream. */
class Newest {
  /** Milliseconds and sequence number, by stream. @type {Map<string, [bigint, bigint]>} */
  #places = new Map();

  /** @param {string} position an event id, or several with dots between them */
  constructor(position) {
    for (const id of position.split(".")) this.advance(id);
  }

  /**
   * Note an event; false if it is not newer than those before it: it came again, or it was escalated
   * and is older. What is not an id of the gateway counts as newer.
   *
   * @param {string} id
   */
  advance(id) {
    const found = EVENT_ID.exec(id);
    if (!found) return true;
    const [milliseconds, sequence] = [BigInt(found[1]), BigInt(found[2])];
    const [before, last] = this.#places.get(found[3]) ?? [-1n, -1n];
    if (milliseconds < before || (milliseconds === before && sequence <= last)) return false;
    this.#places.set(found[3], [milliseconds, sequence]);
    return true;
  }
}

/** Who is present in a branch: the last whole state that the gateway sent, with the changes since. */
class PresenceWatch {
  #branchId;
  /** Null until the first state. @type {Map<string, PresentUser | PresentSession> | null} */
  #present = null;
  watchers = 0;

  /** @param {number} branchId */
  constructor(branchId) {
    this.#branchId = branchId;
  }

  /** @param {any} message */
  receive({ users, sessions, joined = [], left = [] }) {
    if (Array.isArray(users) && Array.isArray(sessions)) {
      this.#present = new Map();
      joined = [...users, ...sessions];
    }
    for (const each of left) this.#present?.delete(presenceKey(each));
    for (const each of joined) this.#present?.set(presenceKey(each), each);
  }

  /** A copy, so that listeners may keep it. @returns {Presence | null} */
  get presence() {
    if (!this.#present) return null;
    const users = [];
    const sessions = [];
    for (const each of this.#present.values()) {
      if ("session_id" in each) sessions.push(each);
      else users.push(each);
    }
    return { branchId: this.#branchId, users, sessions };
  }
}

/** @param {Map<string, unknown>} ids */
const forgetOldest = (ids) => {
  if (ids.size > REMEMBERED_IDS) ids.delete(/** @type {string} */ (ids.keys().next().value));
};

/** @param {PresentUser | PresentSession} item */
const presenceKey = (item) =>
  "session_id" in item ? `session ${item.session_id}` : `${item.endpoint} ${item.user_id}`;

const WAKER_AFTER = 5; // seconds that a page must be hidden
/** Code of a worker that wakes a hidden page: browsers delay a page's timers, not a worker's. */
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
  /** Number of the attempt. After an await, another number means that this attempt is obsolete. */
  #attempt = 0;
  /** Failed attempts since the last stable connection. */
  #failures = 0;
  #openSince = 0;
  /** No attempt before this time, because the gateway asked for it; seconds, by the device's clock. */
  #notBefore = 0;
  /** Seconds that the gateway asked to wait. */
  #retryAfter = 0;
  /** The token of the connection, or of the attempt. */
  #token = "";
  /** A token sent for renewal and not answered yet. A refusal may then concern either token. */
  #pendingToken = "";
  /** The token that was certainly refused. */
  #refusedToken = "";
  /** Whether a token was refused since one was last accepted. */
  #tokenRefused = false;
  #refusalReason = "";
  /** When the gateway will end the connection: unix time by its clock, 0 if unknown. */
  #expires = 0;
  /** Seconds from the planned renewal to the token's expiry. */
  #untilExpiry = 0;
  #tokenLifetime = new Lifetime();
  /** The gateway admitted us while the browser said that there is no network: do not believe it. */
  #ignoreOffline = false;
  #pingInterval;
  /** Pings that the gateway has not answered yet. */
  #unanswered = 0;
  /** Seconds that it has for the next message while a ping is unanswered. */
  #patience = 0;
  #lastEventId;
  #newest = new Newest("");
  /** The events that came last: their ids, and on which attempt's connection. @type {Map<string, number>} */
  #received = new Map();
  /** Types whose events are to be acknowledged; null until the gateway has said which. @type {Set<string> | null} */
  #tracked = null;
  /** Event ids to be acknowledged, in the order they came. @type {string[]} */
  #acks = [];
  /** Whether the application has ever listened to events: else it has none of them. */
  #hasHandler = false;
  /**
   * Events that the application has seen and that the gateway may not know of: how many pings had been
   * sent before it was told, Infinity if that was a request, null if it is to be told.
   *
   * @type {Map<string, number | null>}
   */
  #seen = new Map();
  #pings = 0;
  /** @type {{ resolve: (sectors: number[]) => void, reject: (error: Error) => void }[]} */
  #sectorRequests = [];
  /** By branch. @type {Map<number, PresenceWatch>} */
  #watches = new Map();
  /** @type {Map<string, { due: number, run: () => void, id: ReturnType<typeof setTimeout> }>} */
  #timers = new Map();
  /** Wakes the page while it is hidden. @type {Worker | null} */
  #waker = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #wakerStart;
  #listenerAbort = new AbortController();

  /** @param {Options} options */
  constructor(options) {
    super();
    this.#options = options;
    this.#timings = { ...TIMINGS, ...options.timings };
    this.#pingInterval = this.#timings.ping;
    this.#lastEventId = options.lastEventId ?? "";
    this.#url = new URL(options.url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace(/^http/, "ws");
    this.#url.hash = "";
    this.#WebSocket = options.WebSocket ?? globalThis.WebSocket;
    if (!this.#WebSocket) throw new TypeError("there is no WebSocket: Node has one since version 22");
    for (const name of ["token", "table_token", "ticket"]) {
      if (this.#url.searchParams.has(name)) {
        throw new TypeError(`no ${name} in the URL: URLs appear in logs; use the option token`);
      }
    }
    const here = /** @type {any} */ (globalThis);
    const page = typeof here.addEventListener === "function" ? here : null;
    this.#page = options.page === undefined ? page : options.page;
    this.#addListeners();
    if (this.#page) this.#replaceInPage(this.#page);
    this.#connect(); // emits nothing before its first await, so listeners can be added
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
      this.#sectorRequests.push({ resolve, reject });
      this.#sendMessage({ type: "refresh_sectors" });
      this.#setTimer("sectors", () => this.#settleSectorRequests(null), this.#timings.patience);
    });
  }

  /** @param {number} branchId @param {(presence: Presence) => void} onPresence */
  watchPresence(branchId, onPresence) {
    const stop = new AbortController();
    /** @param {any} event */
    const listener = ({ detail }) => detail.branchId === branchId && onPresence(detail);
    this.addEventListener("presence", listener, { signal: stop.signal });
    const watch = this.#watches.get(branchId) ?? new PresenceWatch(branchId);
    this.#watches.set(branchId, watch);
    if (watch.watchers++) queueMicrotask(() => this.#emitPresence(watch));
    else if (this.#state === "open") this.#sendMessage({ type: "watch_presence", branch_id: branchId });
    return () => {
      if (stop.signal.aborted) return;
      stop.abort();
      if (--watch.watchers) return;
      this.#watches.delete(branchId);
      if (this.#state === "open") this.#sendMessage({ type: "unwatch_presence", branch_id: branchId });
    };
  }

  /** @param {Parameters<EventTarget["addEventListener"]>} all */
  addEventListener(...all) {
    if (all[0] === "event") this.#hasHandler = true;
    super.addEventListener(...all);
  }

  /** @param {GatewayEvent | string} event */
  seen(event) {
    const id = typeof event === "string" ? event : event.event_id;
    if (typeof id !== "string") throw new TypeError("an event without event_id cannot be confirmed");
    this.#seen.set(id, null);
    forgetOldest(this.#seen);
    if (!this.#timers.has("seen")) this.#tellSeen(1);
  }

  /** @param {object | string} message */
  send(message) {
    if (this.#state !== "open") throw new Error(`not connected: ${this.#state}`);
    this.#socket?.send(typeof message === "string" ? message : JSON.stringify(message));
  }

  reconnect() {
    if (this.#ended) return;
    this.#sendReceipts();
    const wait = this.#remainingWait;
    if (wait > 0) this.#retryLater(wait);
    else this.#connect();
  }

  close() {
    this.#sendReceipts();
    this.#finish("closed");
    this.#listenerAbort.abort();
  }

  #addListeners() {
    const { onEvent, onGap, onMessage, onState, onClose, onRefused, onError } = this.#options;
    const options = { signal: this.#listenerAbort.signal };
    /** @param {string} name @param {((detail: any) => void) | undefined} call */
    const on = (name, call) => {
      if (!call) return;
      const listener = /** @param {any} event */ (event) => call(event.detail);
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
    const onPage = (name, call) => this.#page?.addEventListener(name, call, options);
    onPage("offline", () => {
      this.#ignoreOffline = false;
      this.#checkConnection();
    });
    onPage("online", () => this.#checkConnection());
    onPage("pageshow", () => this.#checkConnection());
    onPage("pagehide", () => this.#sendReceipts());
    onPage("visibilitychange", () => {
      this.#updateWaker();
      if (!this.#hidden) this.#checkConnection();
    });
    this.#updateWaker();
  }

  /** Close the page's earlier connection to the same URL. @param {Page} page */
  #replaceInPage(page) {
    const connections = pages.get(page) ?? new Map();
    pages.set(page, connections);
    connections.get(this.#key)?.close();
    connections.set(this.#key, this);
  }

  get #ended() {
    return this.#listenerAbort.signal.aborted;
  }

  get #key() {
    return this.#url.origin + this.#url.pathname;
  }

  /** @param {string} name @param {unknown} detail */
  #emit(name, detail) {
    if (!this.#ended) this.dispatchEvent(new CustomEvent(name, { detail }));
  }

  /** @param {State} state */
  #setState(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.#emit("state", state);
  }

  /**
   * Start a timer; it replaces the one of the same name.
   *
   * @param {string} name @param {() => void} call @param {number} wait
   */
  #setTimer(name, call, wait) {
    this.#clearTimer(name);
    const run = () => {
      this.#timers.delete(name);
      call();
    };
    this.#timers.set(name, { due: seconds() + wait, run, id: after(run, wait) });
    this.#waker?.postMessage(Math.min(wait * 1000 + 10, MAX_TIMER));
  }

  /** @param {string} name */
  #clearTimer(name) {
    clearTimeout(this.#timers.get(name)?.id);
    this.#timers.delete(name);
  }

  /** Run the timers that are due: the browser may delay them while the page is hidden. */
  #runDue() {
    for (const [name, { due, run }] of this.#timers) {
      if (due > seconds()) continue;
      this.#clearTimer(name);
      run();
    }
  }

  get #hidden() {
    return this.#page?.document?.visibilityState === "hidden";
  }

  /** Start the worker when the page has been hidden for a while (it may be closing); end it when shown. */
  #updateWaker() {
    clearTimeout(this.#wakerStart);
    if (this.#hidden && !this.#ended) {
      if (!this.#waker) this.#wakerStart = after(() => this.#startWaker(), WAKER_AFTER);
      return;
    }
    this.#waker?.terminate();
    this.#waker = null;
  }

  /** Where no worker can run (`worker-src` forbids `blob:`), each received message wakes the page. */
  #startWaker() {
    if (this.#waker || typeof Worker !== "function") return;
    const url = URL.createObjectURL(new Blob([WAKER], { type: "text/javascript" }));
    const loaded = () => URL.revokeObjectURL(url); // not earlier, because older Safaris would not load it
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

  // An attempt: get a token, open a socket, be admitted

  async #connect() {
    this.#dropSocket();
    const attempt = this.#attempt;
    this.#setState("connecting");
    if (attempt !== this.#attempt) return; // a listener closed it
    const late = () => this.#disconnected(ABNORMAL_CLOSURE, "not connected in time");
    this.#setTimer("connect", late, this.#timings.connect);
    let token;
    try {
      token = await this.#getToken(this.#tokenRefused);
    } catch (error) {
      if (attempt !== this.#attempt) return;
      this.#emit("error", error);
      if (attempt === this.#attempt) this.#disconnected(ABNORMAL_CLOSURE, "no token: the provider failed");
      return;
    }
    if (attempt !== this.#attempt) return;
    if (!token) return this.#refuse(AUTH_FAILED, "no token");
    if (token === this.#refusedToken) return this.#refuse(AUTH_FAILED, this.#refusalReason);
    this.#open(token);
  }

  /** @param {boolean} refused */
  async #getToken(refused) {
    const { token } = this.#options;
    return typeof token === "function" ? await token({ refused }) : token;
  }

  /** @param {string} token */
  #open(token) {
    let socket;
    try {
      socket = new this.#WebSocket(this.#url, ["gateway.v1", `bearer.${token}`]);
    } catch (error) {
      // The token is not valid as a subprotocol, or the page may not connect: a retry would fail, too.
      return this.#refuse(ABNORMAL_CLOSURE, String(error).replaceAll(token, "…"));
    }
    this.#token = token;
    this.#pendingToken = "";
    this.#expires = claims(token).exp ?? 0;
    this.#socket = socket;
    // Node 22 emits no close event for a connection that could not be made.
    socket.onerror = () => this.#disconnected(ABNORMAL_CLOSURE, "");
    socket.onopen = () => {
      socket.onerror = null; // from now on a close event follows, with the code
      const confirm = this.#options.confirm === false ? { confirm: false } : {};
      this.#sendMessage({ type: "resume", last_event_id: this.#lastEventId, ...confirm });
    };
    socket.onmessage = ({ data }) => this.#receive(data);
    socket.onclose = ({ code, reason }) => this.#disconnected(code, reason);
  }

  #admitted() {
    this.#clearTimer("connect");
    this.#openSince = seconds();
    this.#retryAfter = 0;
    this.#refusedToken = "";
    this.#tokenRefused = false;
    this.#ignoreOffline = this.#page?.navigator?.onLine === false;
    this.#pingInterval = this.#timings.ping;
    this.#newest = new Newest(this.#lastEventId);
    this.#tracked = null;
    this.#schedulePing();
    this.#scheduleRenewal(false);
    this.#sendMessage({ type: "intervals" });
    for (const branchId of this.#watches.keys()) {
      this.#sendMessage({ type: "watch_presence", branch_id: branchId });
    }
    this.#setState("open");
  }

  // Messages from the gateway

  /** @param {unknown} data */
  #receive(data) {
    if (this.#hidden) queueMicrotask(() => this.#runDue());
    const text = String(data);
    let message = null;
    try {
      message = JSON.parse(text);
    } catch {
      // not JSON: the answer to the plain form of a message
    }
    // Only events have a tenant_id. The type does not tell: backends may use any.
    const isEvent = message?.tenant_id !== undefined;
    if (this.#unanswered) this.#receiveAnswer(!isEvent && message?.type === "pong");
    if (isEvent) return this.#receiveEvent(message, text);
    switch (message?.type) {
      case "resumed":
        if (typeof message.last_event_id === "string") this.#lastEventId = message.last_event_id;
        this.#admitted();
        if (!message.recovered) this.#emit("gap", "not_recovered");
        break;
      case "gap":
        this.#emit("gap", "lost");
        break;
      case "auth_ok":
        if (!this.#pendingToken) break; // a repeated answer
        this.#token = this.#pendingToken;
        this.#pendingToken = "";
        this.#expires = message.expires_at;
        this.#scheduleRenewal(true);
        break;
      case "sectors_updated":
        this.#settleSectorRequests(message.sector_ids);
        break;
      case "intervals":
        this.#track(message);
        this.#applyIntervals(message);
        break;
      case "presence":
        this.#receivePresence(message);
        break;
    }
    this.#emit("message", { message, text });
  }

  /** @param {{ heartbeat_timeout?: unknown, receive_timeout?: unknown }} message */
  #applyIntervals({ heartbeat_timeout, receive_timeout }) {
    const timeout = Math.min(Number(heartbeat_timeout), Number(receive_timeout));
    if (!(timeout > 0)) return;
    this.#pingInterval = Math.min(this.#timings.ping, Math.max(MIN_PING_INTERVAL, timeout / 2));
    if (!this.#unanswered) this.#schedulePing();
  }

  /** @param {GatewayEvent} event @param {string} text */
  #receiveEvent(event, text) {
    const id = event.event_id;
    if (typeof id !== "string") return this.#emit("event", { event, text });
    const isNewer = this.#newest.advance(id);
    if (isNewer) this.#lastEventId = id;
    const isRepeated = this.#received.has(id);
    this.#received.set(id, this.#attempt);
    forgetOldest(this.#received);
    const attempt = this.#attempt;
    if (!isRepeated) this.#emit("event", { event, text });
    // The listeners have returned. One of them may have ended this connection.
    if (attempt === this.#attempt) this.#acknowledge(event.type, id, isNewer);
  }

  // Receipts: what the application has received and seen

  /**
   * The gateway says which types it tracks; one of an older version does not.
   *
   * @param {{ receipts?: unknown }} message
   */
  #track({ receipts }) {
    this.#tracked = new Set(Array.isArray(receipts) ? receipts : []);
    this.#sendAcks();
    this.#tellSeen(1);
  }

  /**
   * An ack is also for the events before it in the stream, and for those that the gateway sent before
   * it. One that is older than others, because it was escalated, needs an ack of its own.
   *
   * @param {string} type @param {string} id @param {boolean} isNewer
   */
  #acknowledge(type, id, isNewer) {
    if (!this.#confirms || !EVENT_ID.test(id)) return;
    if (this.#tracked && !this.#tracked.has(type)) return;
    const others = this.#acks.filter((each) => each !== id && !(isNewer && each.slice(-4) === id.slice(-4)));
    this.#acks = [...others, id].slice(-MOST_ACKS);
    if (!this.#tracked) return; // until the gateway has said what it tracks
    if (this.#hidden) this.#sendAcks(); // browsers delay the timers of a hidden page
    else if (!this.#timers.has("ack")) this.#setTimer("ack", () => this.#sendAcks(), ACK_DELAY);
  }

  get #confirms() {
    return this.#hasHandler && this.#options.confirm !== false;
  }

  #sendAcks() {
    if (!this.#tracked) return;
    this.#clearTimer("ack");
    const acks = this.#acks.splice(0);
    if (this.#tracked.size) for (const id of acks) this.#sendMessage({ type: "ack", last_event_id: id });
  }

  /** @param {number} most events of which the gateway is told now; of the others a moment later */
  #tellSeen(most) {
    if (this.#state !== "open" || !this.#tracked) return;
    if (!this.#tracked.size) return this.#seen.clear();
    const untold = [...this.#seen].filter(([, pings]) => pings === null).slice(0, most);
    for (const [id] of untold) {
      const isOfThisConnection = this.#received.get(id) === this.#attempt;
      this.#seen.set(id, isOfThisConnection ? this.#pings : Infinity);
      if (isOfThisConnection) this.#sendMessage({ type: "seen", event_id: id });
      else this.#postSeen(id);
    }
    if (untold.length) this.#setTimer("seen", () => this.#tellSeen(1), SEEN_INTERVAL);
  }

  /** All pings are answered: the gateway has read what was sent before them. Repeat requests that failed. */
  #checkSeen() {
    for (const [id, pings] of this.#seen) {
      if (pings === Infinity) this.#seen.set(id, null);
      else if (pings !== null && pings < this.#pings) this.#seen.delete(id);
    }
    if (!this.#timers.has("seen")) this.#tellSeen(1);
  }

  /** Of an event of an earlier connection a message would be ignored. @param {string} id */
  async #postSeen(id) {
    const url = new URL("receipts", this.#url);
    url.protocol = url.protocol.replace("ws", "http");
    try {
      const { status } = await fetch(url, {
        method: "POST",
        headers: { Authorization: `Bearer ${this.#token}`, "Content-Type": "application/json" },
        body: JSON.stringify({ event_id: id }),
        keepalive: true,
      });
      if (status < 429 && status !== 401) this.#seen.delete(id);
    } catch {
      // no network
    }
  }

  /** Before the connection ends, send what waits. */
  #sendReceipts() {
    this.#sendAcks();
    this.#tellSeen(SEEN_AT_END);
  }

  /** @param {{ branch_id: number }} message */
  #receivePresence(message) {
    const watch = this.#watches.get(message.branch_id);
    if (!watch) return; // not watched any more, or watched with send()
    watch.receive(message);
    this.#emitPresence(watch);
  }

  /** @param {PresenceWatch} watch */
  #emitPresence({ presence }) {
    if (presence) this.#emit("presence", presence);
  }

  /** @param {number[] | null} sectors */
  #settleSectorRequests(sectors) {
    this.#clearTimer("sectors");
    for (const { resolve, reject } of this.#sectorRequests.splice(0)) {
      if (sectors) resolve(sectors);
      else reject(new Error("the gateway did not answer with the sectors"));
    }
  }

  /** @param {object} message */
  #sendMessage(message) {
    this.#socket?.send(JSON.stringify(message));
  }

  // Liveness of the socket

  /**
   * Started by the answer to a ping, not by the timer that sent the ping: browsers run chained timers
   * of a hidden tab once a minute, which is too late for the gateway's timeout of 60 seconds.
   */
  #schedulePing() {
    this.#unanswered = 0;
    this.#clearTimer("pong");
    const due = seconds() + this.#pingInterval;
    const ping = () => this.#ping(this.#isLate(due));
    this.#setTimer("ping", ping, this.#pingInterval);
  }

  /** @param {boolean} short whether to wait for the short time only */
  #ping(short) {
    this.#patience = short ? this.#timings.shortPatience : this.#timings.patience;
    this.#unanswered++;
    this.#pings++;
    this.#clearTimer("ping");
    this.#awaitPong();
    if (!this.#lastEventId || !this.#confirms) this.#socket?.send("ping");
    else this.#sendMessage({ type: "ping", last_event_id: this.#lastEventId });
  }

  #awaitPong() {
    const due = seconds() + this.#patience;
    this.#setTimer(
      "pong",
      () => {
        // After a sleep the answer may have arrived and not been read yet.
        if (this.#isLate(due)) this.#ping(true);
        else this.#disconnected(ABNORMAL_CLOSURE, "no answer to a ping");
      },
      this.#patience,
    );
  }

  /**
   * A message has arrived while a ping is unanswered. Only a pong for each ping shows that the gateway
   * lives now: other messages, and the pong to an earlier ping, may have been on their way before the
   * network went. On a slow connection they are progress, so there is more time for the next one.
   *
   * @param {boolean} isPong
   */
  #receiveAnswer(isPong) {
    if (isPong && this.#unanswered === 1) {
      this.#checkSeen();
      this.#schedulePing();
      return;
    }
    if (isPong) this.#unanswered--;
    this.#awaitPong();
  }

  /** Whether a timer is so late that the device must have slept. @param {number} due */
  #isLate(due) {
    return seconds() - due > SLEEP_THRESHOLD;
  }

  /** The tab is shown or the network has changed: check the socket, or try again if the wait is over. */
  #checkConnection() {
    if (this.#state === "open") this.#ping(true);
    if (this.#state !== "waiting" && this.#state !== "offline") return;
    const wait = this.#remainingWait;
    if (!this.#offline) {
      if (wait > 0) this.#retryLater(wait);
      else this.#connect();
    } else if (this.#state === "waiting") {
      this.#retryLater(Math.max(wait, this.#offlineInterval()));
    }
  }

  /** Rest of the wait that the gateway asked for; a clock that was set back does not extend it. */
  get #remainingWait() {
    return Math.min(this.#notBefore - seconds(), this.#retryAfter);
  }

  get #offline() {
    return !this.#ignoreOffline && this.#page?.navigator?.onLine === false;
  }

  /** Seconds until the next attempt while offline: the browser may be wrong (VPNs, virtual adapters). */
  #offlineInterval() {
    return this.#timings.offline * (1 + Math.random());
  }

  // Renewal of the token

  /** @param {boolean} renewed */
  #scheduleRenewal(renewed) {
    if (!this.#expires || typeof this.#options.token !== "function") return;
    const { iat } = claims(this.#token);
    const left = this.#tokenLifetime.remaining(iat, this.#expires, seconds());
    // If a new token seems to be about to expire, the clock is wrong: do not renew without pause.
    const { known, unknown } = MIN_RENEWAL_INTERVAL;
    const least = iat === undefined ? unknown : known * (this.#expires - iat);
    this.#untilExpiry = left;
    this.#renewAfter(Math.max(1, renewed ? least : 0, RENEW_AT * left));
  }

  /** @param {number} wait */
  #renewAfter(wait) {
    this.#untilExpiry -= wait;
    this.#setTimer("renew", () => this.#renew(), wait);
  }

  async #renew() {
    const attempt = this.#attempt;
    // Plan the next try first, in case this one fails: the present token is still valid for a while.
    this.#renewAfter(this.#untilExpiry > 0 ? Math.max(1, RENEW_AT * this.#untilExpiry) : RENEWAL_RETRY);
    try {
      const token = await this.#getToken(false);
      if (attempt !== this.#attempt || !token || token === this.#token) return;
      this.#pendingToken = token;
      this.#sendMessage({ type: "auth", token });
    } catch (error) {
      if (attempt === this.#attempt) this.#emit("error", error);
    }
  }

  // The end of a socket, and the next attempt

  /** Close the socket, and clear all timers and pending requests. */
  #dropSocket() {
    this.#attempt++;
    for (const name of this.#timers.keys()) this.#clearTimer(name);
    this.#unanswered = 0;
    this.#acks = [];
    for (const id of this.#seen.keys()) this.#seen.set(id, null);
    const socket = this.#socket;
    this.#socket = null;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onerror = socket.onclose = null;
    // Do not wait for its close event: without a network that may take a minute.
    socket.close(1000);
    this.#settleSectorRequests(null);
  }

  /** @param {number} code @param {string} reason */
  #disconnected(code, reason) {
    const wasOpen = this.#state === "open";
    const wasStable = wasOpen && seconds() - this.#openSince >= this.#timings.stable;
    if (wasStable) this.#failures = 0;
    this.#dropSocket();
    const next = afterClose(code);
    if (next === "stop") return this.#refuse(code, reason);
    if (next === "renew") this.#markTokenRefused(reason, wasOpen);
    // No jitter on a hint: the gateway has given each client another one.
    let asked = retryHint(reason);
    if (next === "cool down") asked ??= this.#timings.coolDown * (1 + Math.random());
    this.#retryAfter = asked ?? 0;
    this.#notBefore = seconds() + this.#retryAfter;
    let wait = asked ?? this.#backOff(next === "renew");
    if (this.#offline) wait = Math.max(wait, this.#offlineInterval());
    const attempt = this.#attempt;
    this.#emit("close", { code, reason, retryIn: wait });
    if (attempt === this.#attempt) this.#retryLater(wait);
  }

  /**
   * A token counts as refused only if the answer certainly concerned it. During a renewal it may concern
   * either token, so the provider's next token is tried, even if it is the same.
   *
   * @param {string} reason @param {boolean} wasOpen
   */
  #markTokenRefused(reason, wasOpen) {
    this.#tokenRefused = true;
    this.#refusalReason = reason;
    this.#refusedToken = this.#pendingToken ? "" : this.#token;
    if (wasOpen && !this.#pendingToken && this.#expires && reason.includes("expired")) {
      this.#tokenLifetime.expired(this.#expires, seconds());
    }
  }

  /** A random wait below a bound that doubles, so that many clients do not return at the same time. */
  #backOff(firstAtOnce = false) {
    const { backOff, longest } = this.#timings;
    const bound = Math.min(longest, backOff * 2 ** this.#failures);
    return this.#failures++ || !firstAtOnce ? Math.random() * bound : 0;
  }

  /** @param {number} wait */
  #retryLater(wait) {
    this.#setTimer("retry", () => this.#connect(), wait);
    this.#setState(this.#offline ? "offline" : "waiting");
  }

  /** @param {number} code @param {string} reason */
  #refuse(code, reason) {
    const attempt = this.#attempt;
    const ending = { code, reason, retryIn: null };
    this.#emit("close", ending);
    if (attempt !== this.#attempt) return;
    this.#finish("refused", ending);
  }

  /** @param {State} state @param {Ending} [ending] */
  #finish(state, ending) {
    if (this.#state === "refused" || this.#state === "closed") return;
    this.#dropSocket();
    // Before the listeners are called: they may connect again.
    const connections = this.#page && pages.get(this.#page);
    if (connections?.get(this.#key) === this) connections.delete(this.#key);
    this.#setState(state);
    if (ending) this.#emit("refused", ending);
    this.#listenerAbort.abort();
    this.#updateWaker();
  }
}

/** @type {typeof import("./client.d.ts").connect} */
export const connect = (options) => new Connection(options);
