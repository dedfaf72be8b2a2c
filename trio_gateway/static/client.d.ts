/** A client of trio-gateway. All times are in seconds. */

/** An event as the backend published it. A durable event has an `event_id` as well. */
export interface GatewayEvent {
  type: string;
  tenant_id: number;
  branch_id: number;
  event_id?: string;
  [key: string]: any;
}

/**
 * - `connecting`: gets a token, opens a socket, waits for admission
 * - `open`: admitted; events arrive
 * - `waiting`: will try again after a while
 * - `offline`: the browser says that there is no network. The client tries again when the browser says
 *   that there is one, and at long intervals until then, because browsers are wrong with some VPNs
 * - `refused`: ended by the gateway; the client does not try again
 * - `closed`: ended by `close()`, or by a later `connect()` of this page to the same URL
 */
export type State = "connecting" | "open" | "waiting" | "offline" | "refused" | "closed";

/** How a connection ended. */
export interface Ending {
  /** The gateway's close code; 1006 if none was received or the socket was dead. */
  code: number;
  reason: string;
  /** Seconds until the next attempt (sooner if the network comes back); null if there is none. */
  retryIn: number | null;
}

/**
 * Why events may be missing.
 *
 * - `lost`: they were lost between backend and gateway
 * - `not_recovered`: the gateway does not know the position to resume from, or no longer
 */
export type GapReason = "lost" | "not_recovered";

/**
 * Provides tokens. It is called before every attempt to connect and before the token expires, and may
 * return a cached token. `refused` is true if the gateway has refused a token: to return that token
 * again ends the connection with `refused`. No token (null, undefined, "") before an attempt does the
 * same. An exception counts as a failed attempt; the provider is called again later.
 */
export type TokenProvider = (asked: {
  refused: boolean;
}) => string | null | undefined | Promise<string | null | undefined>;

/** A user on an endpoint, with one connection or several. The same user on two endpoints is present twice. */
export interface PresentUser {
  user_id: string;
  endpoint: "waiter" | "kitchen" | "admin";
  /** A waiter's sectors in this branch. */
  sector_ids: number[];
  /** As of this item. A further connection of a user who is present changes nothing and is not told. */
  connections: number;
  /** Unix time. */
  since: number;
}

/** The diners of a table. */
export interface PresentSession {
  session_id: number;
  table_id: number;
  connections: number;
}

/** Who is present in a branch, on all processes together. */
export interface Presence {
  branchId: number;
  users: PresentUser[];
  sessions: PresentSession[];
}

/** A source of events about the network and the tab: a `window`, or a worker's `self`. */
export interface Page extends EventTarget {
  readonly navigator?: { readonly onLine?: boolean };
  readonly document?: { readonly visibilityState: string };
}

/** Seconds. The defaults suit most networks; tests and unusual networks may need others. */
export interface Timings {
  /** From the answer to one ping to the next ping; less if the gateway asks for it. Default: 25 */
  ping: number;
  /** Time for the answer to a ping. Default: 10 */
  patience: number;
  /** The same after the device slept, changed its network or showed the tab. Default: 3 */
  shortPatience: number;
  /** Time for an attempt to connect, the token provider included. Default: 15 */
  connect: number;
  /** First upper bound of the random wait between attempts; each attempt doubles it. Default: 1 */
  backOff: number;
  /** Greatest upper bound of that wait. Default: 30 */
  longest: number;
  /** After 4029 the wait is between this and twice this. Default: 30 */
  coolDown: number;
  /** While the browser says that there is no network: between this and twice this. Default: 30 */
  offline: number;
  /** A connection that lasted this long resets the back-off. Default: 10 */
  stable: number;
}

export interface Options {
  /** `wss://…/ws/waiter`, in a page also `/ws/waiter`. It must not contain a token. */
  url: string | URL;
  token: string | TokenProvider;
  /** Called once for each event, with its text as received (numbers over 2^53 are exact only there). */
  onEvent?: (event: GatewayEvent, text: string) => void;
  /** Events may be missing: fetch your state again. */
  onGap?: (reason: GapReason) => void;
  /** Called for each other message (mostly answers), and its text. `message` is null if it is not JSON. */
  onMessage?: (message: any, text: string) => void;
  onState?: (state: State) => void;
  onClose?: (ending: Ending) => void;
  /** The client does not try again: sign in again, or fix the cause that the code names. */
  onRefused?: (ending: Ending) => void;
  /** The token provider threw an exception or rejected. */
  onError?: (error: unknown) => void;
  /**
   * Whether the gateway is told of what `onEvent` was called with: `false` for a page that only watches, so
   * that nobody takes it for somebody who has the events. Default: true
   */
  confirm?: boolean;
  /** Position to resume from: an earlier page's `gateway.lastEventId`. */
  lastEventId?: string;
  /** The page that it belongs to. Default: this page; null: none (as under Node). */
  page?: Page | null;
  /** Default: the global `WebSocket`. */
  WebSocket?: typeof WebSocket;
  timings?: Partial<Timings>;
}

/** The `on…` options as events for `addEventListener`. Their arguments are in `detail`. */
export interface GatewayEventMap {
  event: CustomEvent<{ event: GatewayEvent; text: string }>;
  gap: CustomEvent<GapReason>;
  message: CustomEvent<{ message: any; text: string }>;
  presence: CustomEvent<Presence>;
  state: CustomEvent<State>;
  close: CustomEvent<Ending>;
  refused: CustomEvent<Ending>;
  error: CustomEvent<unknown>;
}

/** Derived, because Node's types have no names for these. */
type Listen = Parameters<EventTarget["addEventListener"]>;

/** A connection that outlives its sockets: it opens another one whenever a socket ends. */
export interface Gateway extends EventTarget {
  readonly state: State;
  /**
   * Position to resume from: the newest event, not the last one, which may be older. Empty until the client
   * was first admitted. It may be stored at any time.
   */
  readonly lastEventId: string;
  /** Ask the gateway to look up this waiter's sectors now. Rejects if no answer comes in time. */
  refreshSectors(): Promise<number[]>;
  /**
   * Watch who is present in a branch of this admin, where the gateways have `WS_CLUSTER`. `onPresence` is
   * called with everybody who is present, first when the gateway has answered, then after each change and
   * each reconnect. Returns a function that ends it. It may be called in any state.
   */
  watchPresence(branchId: number, onPresence: (presence: Presence) => void): () => void;
  /**
   * The user has seen this durable event (or the one with this id): tell the gateway, at the latest when it
   * can be reached again. A TypeError for an event without `event_id`.
   */
  seen(event: GatewayEvent | string): void;
  /** Send a message of your own, an object as JSON. Throws unless the state is `open`. */
  send(message: object | string): void;
  /** Drop the socket and resume on another one: at once, or after the wait that the gateway asked for. */
  reconnect(): void;
  /** End the connection. No listener is called afterwards. */
  close(): void;
  addEventListener<K extends keyof GatewayEventMap>(
    type: K,
    listener: ((event: GatewayEventMap[K]) => void) | null,
    options?: Listen[2],
  ): void;
  addEventListener(type: string, listener: Listen[1], options?: Listen[2]): void;
}

/**
 * Connect, and stay connected until `close()` or a refusal.
 *
 * A page has one connection to a URL (without its query): a second `connect` closes the first one,
 * because another user may have signed in.
 */
export declare function connect(options: Options): Gateway;

/**
 * What a client should do after a close code: `back off` and try again, `cool down` and try again,
 * `renew` the token, or `stop`.
 */
export declare function afterClose(code: number): "back off" | "cool down" | "renew" | "stop";

export {};
