/** A client of trio-gateway. All times are in seconds. */

/** An event as the backend published it; a durable one has its `event_id` as well. */
export interface GatewayEvent {
  type: string;
  tenant_id: number;
  branch_id: number;
  event_id?: string;
  [key: string]: any;
}

/**
 * - `connecting`: asking for a token, opening, waiting to be let in
 * - `open`: let in; events arrive
 * - `waiting`: will try again by itself, after a while
 * - `offline`: the browser says that there is no network; will try again when it says that there is
 *   one, and seldom until then, because browsers are wrong about it with some VPNs and adapters
 * - `refused`: ended by the gateway, for good
 * - `closed`: ended by `close()`, or by a later `connect()` of this page to the same URL
 */
export type State = "connecting" | "open" | "waiting" | "offline" | "refused" | "closed";

/** How a connection ended. */
export interface Ending {
  /** The gateway's close code; 1006 if there was none, or the socket was found to be dead. */
  code: number;
  reason: string;
  /** Seconds until the next attempt, sooner if the network comes back; null: none is made. */
  retryIn: number | null;
}

/**
 * Why events may be missing: `lost` between backend and gateway; `not_recovered` because the
 * gateway no longer knew (or never knew) the place to resume from.
 */
export type GapReason = "lost" | "not_recovered";

/**
 * Where tokens come from: asked before every connect and before the token expires. It may keep
 * a token for as long as it is valid, but when `refused` is true the gateway has refused a token:
 * the one that it refused, again, ends the connection for good. No token (null, "") ends it too; an error
 * counts as a failed attempt, and it is asked again later.
 */
export type TokenProvider = (asked: {
  refused: boolean;
}) => string | null | undefined | Promise<string | null | undefined>;

/** Whatever tells of the device's network and of the tab; a `window`, or a worker's `self`. */
export interface Page extends EventTarget {
  readonly navigator?: { readonly onLine?: boolean };
  readonly document?: { readonly visibilityState: string };
}

/** Good as they are; for tests and for networks of an uncommon kind. Seconds. */
export interface Timings {
  /** From the answer to one ping to the next ping, less if the gateway asks for it. 25 */
  ping: number;
  /** Until a ping must be answered. 10 */
  patience: number;
  /** The same after the device slept or changed its network. 3 */
  shortPatience: number;
  /** Until an attempt must have succeeded. 15 */
  connect: number;
  /** The back-off's first upper bound, doubled with each attempt; the wait is drawn below it. 1 */
  backOff: number;
  /** Its last upper bound. 30 */
  longest: number;
  /** After 4029 the wait is between this and twice this. 30 */
  coolDown: number;
  /** While the browser says that there is no network, attempts are this to twice this apart. 30 */
  offline: number;
  /** A connection that held for this long makes the back-off begin anew. 10 */
  stable: number;
}

export interface Options {
  /** `wss://…/ws/waiter`; in a page `/ws/waiter` will do. It must not hold a token. */
  url: string | URL;
  token: string | TokenProvider;
  /** Each event, once, and its text as it came (numbers over 2^53 are exact only there). */
  onEvent?: (event: GatewayEvent, text: string) => void;
  /** Events may be missing: fetch your state again. */
  onGap?: (reason: GapReason) => void;
  /** What else the gateway says: answers, mostly (null: no JSON), and its text. */
  onMessage?: (message: any, text: string) => void;
  onState?: (state: State) => void;
  onClose?: (ending: Ending) => void;
  /** It has ended for good: sign in again, or mend what the code names. */
  onRefused?: (ending: Ending) => void;
  /** The token provider failed. */
  onError?: (error: unknown) => void;
  /** A place to begin from, kept from another page's `gateway.lastEventId`. */
  lastEventId?: string;
  /** The page it lives in. Default: this one; null: none, as under Node. */
  page?: Page | null;
  /** Default: the global one. */
  WebSocket?: typeof WebSocket;
  timings?: Partial<Timings>;
}

/** The same as the `on…` options, for `addEventListener`; what they are given is the `detail`. */
export interface GatewayEventMap {
  event: CustomEvent<{ event: GatewayEvent; text: string }>;
  gap: CustomEvent<GapReason>;
  message: CustomEvent<{ message: any; text: string }>;
  state: CustomEvent<State>;
  close: CustomEvent<Ending>;
  refused: CustomEvent<Ending>;
  error: CustomEvent<unknown>;
}

/** By this way, since Node's types have no names for these. */
type Listen = Parameters<EventTarget["addEventListener"]>;

/** A connection that stays, by as many sockets one after the other as it takes. */
export interface Gateway extends EventTarget {
  readonly state: State;
  /** Where it would resume from; empty until it was first let in. Always safe to keep. */
  readonly lastEventId: string;
  /** Ask the gateway to look up this waiter's sectors now. Rejects unless it answers. */
  refreshSectors(): Promise<number[]>;
  /** Say something of your own, JSON or a word; throws unless the state is `open`. */
  send(message: object | string): void;
  /** Give the socket up and connect again at once, unless the gateway has asked to wait; resumes. */
  reconnect(): void;
  /** End it. Nothing is called any more. */
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
 * A page has one connection to a URL (its query aside): a second `connect` closes the first,
 * since it may be somebody else who has signed in.
 */
export declare function connect(options: Options): Gateway;

/**
 * What a close code asks of a client: `back off` and try again, `cool down` first, `renew` the token,
 * or `stop`.
 */
export declare function afterClose(code: number): "back off" | "cool down" | "renew" | "stop";

export {};
