/** The client's decisions, on a fake WebSocket and in virtual time. */

import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { afterClose, connect } from "../../../trio_gateway/static/client.js";
import { Clock, FakePage, FakeWebSocket, TestClient, isPing, jwt, setRandom, settle } from "./fakes.js";

const HOUR = 3600;
/** @type {Clock} */
let clock;

beforeEach(() => {
  clock = new Clock();
  FakeWebSocket.all = [];
});
afterEach(() => {
  for (const { client } of clients.splice(0)) client.close();
  Reflect.deleteProperty(globalThis, "Worker");
  mock.timers.reset();
  mock.restoreAll();
});

/** @type {TestClient[]} */
const clients = [];
/** @param {ConstructorParameters<typeof TestClient>[0]} [options] */
const start = async (options) => {
  const started = new TestClient(options);
  clients.push(started);
  await settle();
  return started;
};
/** @param {ConstructorParameters<typeof TestClient>[0]} [options] */
const open = async (options) => {
  const opened = await start(options);
  opened.socket.admit();
  return opened;
};
const sockets = () => FakeWebSocket.all.length;
const live = () => FakeWebSocket.all.filter((socket) => socket.live).length;

/** Seconds until there is another socket. @param {number} most */
const untilNext = async (most) => {
  const before = sockets();
  for (let waited = 0; waited <= most; waited += 0.1) {
    if (sockets() > before) return waited;
    await clock.pass(0.1);
  }
  return Infinity;
};

// Connecting

test("the token is sent as a subprotocol and never in the URL", async () => {
  const { socket } = await start({ token: "a.b.c" });
  assert.deepEqual(socket.protocols, ["gateway.v1", "bearer.a.b.c"]);
  assert.equal(socket.url, "wss://gateway.example/ws/waiter");
});

for (const name of ["token", "table_token", "ticket"]) {
  test(`a URL that contains a ${name} is a TypeError`, () => {
    assert.throws(() => connect({ url: `wss://gateway.example/ws/diner?${name}=x`, token: "x" }), {
      name: "TypeError",
      message: new RegExp(`^no ${name} in the URL`),
    });
    assert.equal(sockets(), 0);
  });
}

test("a token that is not valid as a subprotocol is refused, and appears in no error", async () => {
  const client = await start({ token: "1:1:10:456:1790000000:secret" });
  assert.equal(client.client.state, "refused");
  assert.doesNotMatch(JSON.stringify(client.calls), /secret/);
});

test("an error of the WebSocket constructor and a missing WebSocket are reported", async () => {
  const mixed = class {
    constructor() {
      throw new DOMException("an insecure connection may not be initiated", "SecurityError");
    }
  };
  const client = await start({ WebSocket: /** @type {any} */ (mixed) });
  assert.match(client.of("refused")[0].reason, /^SecurityError: an insecure connection/);
  mock.property(globalThis, "WebSocket", undefined);
  assert.throws(() => connect({ url: "wss://gateway.example/ws/waiter", token: "x" }), /version 22/);
});

test("an https URL becomes wss, and a fragment is removed", async () => {
  const { socket } = await start({ url: "https://gateway.example/ws/kitchen#here" });
  assert.equal(socket.url, "wss://gateway.example/ws/kitchen");
});

test("the state is open when the gateway has admitted the client, not when the socket opens", async () => {
  const { client, socket } = await start();
  socket.open();
  assert.equal(client.state, "connecting");
  socket.receive({ type: "resumed", recovered: true, count: 0, last_event_id: "0" });
  assert.equal(client.state, "open");
});

test("listeners are called only after connect() has returned", async () => {
  /** @type {string[]} */
  const states = [];
  const { client } = await start({ onState: () => states.push(client.state) });
  clients[0].socket.admit();
  assert.deepEqual(states, ["open"]);
});

test("an attempt that hangs is ended and repeated", async () => {
  setRandom(0.5);
  const { calls } = await start();
  await clock.pass(14.9);
  assert.equal(sockets(), 1);
  await clock.pass(1);
  assert.equal(sockets(), 2);
  assert.equal(live(), 1);
  assert.deepEqual(calls[0], ["close", { code: 1006, reason: "not connected in time", retryIn: 0.5 }]);
});

test("events of a dropped socket are ignored", async () => {
  setRandom(0.5);
  const client = await start();
  await clock.pass(16);
  const [first, second] = FakeWebSocket.all;
  first.fail();
  first.end(4003);
  first.admit();
  assert.equal(client.of("close").length, 1);
  assert.equal(client.client.state, "connecting");
  second.admit();
  assert.equal(client.client.state, "open");
});

test("an error without a close event counts as a failed attempt", async () => {
  setRandom(0.5);
  const client = await start();
  client.socket.fail();
  assert.deepEqual(client.of("close"), [{ code: 1006, reason: "", retryIn: 0.5 }]);
  await clock.pass(0.6);
  assert.equal(sockets(), 2);
});

test("an error of an open socket is reported with the close code that follows", async () => {
  const client = await open();
  client.socket.end(4003, "forbidden");
  assert.equal(client.of("refused")[0].code, 4003);
  assert.equal(client.of("close").length, 1);
});

// The token provider

test("a provider that throws is called again with back-off, and its error is reported", async () => {
  setRandom(0.999);
  let calls = 0;
  const client = await start({
    token: () => {
      calls++;
      throw new Error("no network");
    },
  });
  await clock.pass(0.9);
  assert.equal(calls, 1);
  await clock.pass(0.2);
  assert.equal(calls, 2);
  await clock.pass(10 * 60);
  assert.ok(calls < 30, `${calls} times`);
  assert.equal(sockets(), 0);
  assert.equal(client.of("error")[0].message, "no network");
});

test("a provider that never answers is called again", async () => {
  let calls = 0;
  await start({
    token: () => {
      calls++;
      return new Promise(() => {});
    },
  });
  await clock.pass(20);
  assert.equal(calls, 2);
});

for (const none of [null, undefined, ""]) {
  test(`a provider without a token (${JSON.stringify(none)}) ends in refused`, async () => {
    const client = await start({ token: async () => none });
    assert.deepEqual(client.of("refused"), [{ code: 4001, reason: "no token", retryIn: null }]);
    await clock.pass(HOUR);
    assert.equal(sockets(), 0);
  });
}

test("a token that arrives after close() opens no socket", async () => {
  /** @type {(token: string) => void} */
  let answer = () => {};
  const { client } = await start({ token: () => new Promise((resolve) => (answer = resolve)) });
  client.close();
  answer("late");
  await clock.pass(60);
  assert.equal(sockets(), 0);
});

// Close codes

const CONTRACT = {
  "back off": [1000, 1001, 1005, 1006, 1011, 1012, 1013, 4008, 4009, 4500],
  "cool down": [4029],
  renew: [4001],
  stop: [1002, 1003, 1007, 1008, 1009, 4003],
};
for (const [what, codes] of Object.entries(CONTRACT)) {
  for (const code of codes) {
    test(`after ${code} a client should: ${what}`, () => assert.equal(afterClose(code), what));
  }
}

for (const code of CONTRACT.stop) {
  test(`after ${code} it never connects again`, async () => {
    const client = await open();
    client.socket.end(code, "the gateway's reason");
    await clock.pass(HOUR);
    client.page.show(true);
    client.page.network(true);
    await clock.pass(60);
    assert.equal(sockets(), 1);
    assert.equal(client.client.state, "refused");
    const ending = { code, reason: "the gateway's reason", retryIn: null };
    assert.deepEqual(client.of("close"), [ending]);
    assert.deepEqual(client.of("refused"), [ending]);
  });
}

for (const code of CONTRACT["back off"]) {
  test(`after ${code} the bound of the wait doubles up to half a minute`, async () => {
    setRandom(0.999999);
    const client = await start();
    for (const bound of [1, 2, 4, 8, 16, 30, 30, 30]) {
      client.socket.open();
      client.socket.end(code);
      const waited = await untilNext(60);
      assert.ok(Math.abs(waited - bound) < 0.15, `${waited} instead of ${bound}`);
    }
    assert.deepEqual(client.of("refused"), []);
  });
}

test("the wait is random, from zero to its bound", async () => {
  const client = await start();
  for (const drawn of [0, 0.25, 0.5]) {
    setRandom(drawn);
    client.socket.end(1006);
    await untilNext(60);
  }
  assert.deepEqual(
    client.of("close").map(({ retryIn }) => retryIn),
    [0, 0.5, 2],
  );
});

test("a connection that lasted resets the back-off, a short one does not", async () => {
  setRandom(0.5);
  const client = await start();
  for (const held of [0, 0, 0, 3, 11, 0]) {
    client.socket.admit();
    await clock.pass(held);
    client.socket.end(1013);
    await untilNext(60);
  }
  assert.deepEqual(
    client.of("close").map(({ retryIn }) => retryIn),
    [0.5, 1, 2, 4, 0.5, 1],
  );
});

test("the client waits for exactly the time in the close reason", async () => {
  const client = await open();
  client.socket.end(1001, "retry in 3.2s");
  assert.equal(client.of("close")[0].retryIn, 3.2);
  await clock.pass(3.1);
  assert.equal(sockets(), 1);
  await clock.pass(0.1);
  assert.equal(sockets(), 2);
});

test("a shown tab or a returning network does not shorten the wait that the gateway asked for", async () => {
  const client = await open();
  client.socket.end(1001, "retry in 30.5s");
  await clock.pass(10);
  client.page.show(true);
  client.page.network(false);
  client.page.network(true);
  await clock.pass(20.4);
  assert.equal(sockets(), 1);
  await clock.pass(0.2);
  assert.equal(sockets(), 2);
});

test("a hint that is longer than the longest timer does not become zero", async () => {
  const client = await open();
  client.socket.end(1001, "retry in 9999999s");
  await clock.pass(HOUR);
  assert.equal(sockets(), 1);
});

for (const [drawn, wait] of [
  [0, 30],
  [0.5, 45],
  [0.999, 59.97],
]) {
  test(`after 4029 it waits for ${wait} s if the random number is ${drawn}`, async () => {
    setRandom(drawn);
    const client = await open();
    client.socket.end(4029, "rate limited");
    await clock.pass(10);
    client.page.show(true);
    await clock.pass(wait - 10.2);
    assert.equal(sockets(), 1);
    await clock.pass(0.4);
    assert.equal(sockets(), 2);
  });
}

test("a hint takes precedence over the cool-down after 4029", async () => {
  const client = await open();
  client.socket.end(4029, "retry in 3.5s");
  assert.equal(client.of("close")[0].retryIn, 3.5);
});

test("a clock that is set back does not extend a wait", async () => {
  const client = await open();
  client.socket.end(1001, "retry in 10.5s");
  clock.sleep(-HOUR);
  client.page.show(true);
  await clock.pass(10.6);
  assert.equal(sockets(), 2);
});

test("after 4001 the same token is not tried again", async () => {
  let calls = 0;
  const client = await start({
    token: () => {
      calls++;
      return "refused";
    },
  });
  client.socket.end(4001, "token expired");
  await clock.pass(HOUR);
  assert.equal(calls, 2);
  assert.equal(sockets(), 1);
  assert.equal(client.client.state, "refused");
  assert.equal(client.of("refused")[0].code, 4001);
});

test("after 4001 a fresh token is tried at once, and the provider is called with refused: true", async () => {
  /** @type {boolean[]} */
  const calls = [];
  const client = await open({
    token: ({ refused }) => {
      calls.push(refused);
      return `token${calls.length}`;
    },
  });
  client.socket.end(4001, "token expired");
  await clock.pass(0.1);
  assert.equal(client.socket.token, "token2");
  client.socket.admit();
  assert.equal(client.client.state, "open");
  client.socket.end(1006);
  await untilNext(60);
  assert.deepEqual(calls, [false, true, false]);
  assert.deepEqual(client.of("refused"), []);
});

test("fresh tokens that are all refused are tried with back-off", async () => {
  let calls = 0;
  const client = await start({ token: () => `token${++calls}` });
  for (let minute = 0; minute < 10; minute++) {
    for (let second = 0; second < 60; second++) {
      await clock.pass(1);
      if (client.socket.live) client.socket.end(4001, "bad signature");
    }
  }
  assert.ok(calls > 5 && calls < 100, `called ${calls} times`);
});

test("a refused token stays refused after attempts that failed for other reasons", async () => {
  const tokens = ["refused", "fresh", "refused"];
  const client = await start({ token: () => tokens.shift() });
  client.socket.end(4001, "revoked");
  await clock.pass(0.1);
  client.socket.end(1006);
  await clock.pass(60);
  assert.equal(sockets(), 2);
  assert.equal(client.client.state, "refused");
});

// Resume

test("the first resume asks for the present position, later ones for the last event received", async () => {
  setRandom(0);
  const client = await start();
  client.socket.open();
  assert.deepEqual(client.socket.sent, ['{"type":"resume","last_event_id":""}']);
  client.socket.end(1006);
  await clock.pass(0.1);
  client.socket.admit({ last_event_id: "position" });
  client.socket.end(1006);
  await clock.pass(0.1);
  client.socket.open();
  assert.deepEqual(client.socket.sent, ['{"type":"resume","last_event_id":"position"}']);
  client.socket.admit({ last_event_id: "position" });
  client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id: "7" });
  client.socket.receive({ type: "CART_CLEARED", tenant_id: 1 });
  assert.equal(client.client.lastEventId, "7");
  client.socket.end(1006);
  await clock.pass(0.1);
  client.socket.open();
  assert.deepEqual(client.socket.sent, ['{"type":"resume","last_event_id":"7"}']);
});

test("an answer without a position leaves the known position unchanged", async () => {
  setRandom(0);
  const client = await open({ lastEventId: "stored" });
  client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id: "7" });
  client.socket.end(1006);
  await clock.pass(0.1);
  client.socket.open();
  client.socket.receive({ type: "resumed", recovered: false, count: 0 });
  assert.equal(client.client.lastEventId, "7");
  assert.deepEqual(client.of("gap"), ["not_recovered"]);
});

for (const code of [1001, 1006, 1011, 1013, 4001, 4008, 4009, 4029]) {
  test(`the position survives ${code}, and a gap is reported once`, async () => {
    setRandom(0);
    let calls = 0;
    const client = await open({ token: () => `token${++calls}` });
    client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id: "7" });
    client.socket.receive({ type: "gap" });
    client.socket.end(code);
    await clock.pass(61);
    client.socket.open();
    assert.equal(client.socket.sent[0], '{"type":"resume","last_event_id":"7"}');
    client.socket.admit({ last_event_id: "7" });
    assert.deepEqual(client.of("gap"), ["lost"]);
  });
}

test("only the last thousand event ids are remembered", async () => {
  const client = await open();
  for (let id = 0; id <= 1000; id++) {
    client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id: `${id}` });
  }
  for (const event_id of ["1", "0"]) {
    client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id });
  }
  assert.equal(client.of("event").length, 1002);
  assert.equal(client.of("event").at(-1).event_id, "0");
});

test("it resumes from the lastEventId of another page", async () => {
  const { socket } = await start({ lastEventId: "stored" });
  socket.open();
  assert.deepEqual(socket.sent, ['{"type":"resume","last_event_id":"stored"}']);
});

test("an event id is reported once, events without an id always", async () => {
  const client = await open();
  for (const event_id of ["1", "2", "1", undefined, undefined, "2", "3"]) {
    client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id });
  }
  assert.deepEqual(
    client.of("event").map((event) => event.event_id),
    ["1", "2", undefined, undefined, "3"],
  );
});

test("lost events and an unknown position are reported as gaps, after the state is open", async () => {
  const client = await start();
  client.socket.admit({ recovered: false });
  client.socket.receive({ type: "gap" });
  assert.deepEqual(client.calls, [
    ["state", "open"],
    ["gap", "not_recovered"],
    ["gap", "lost"],
  ]);
});

for (const type of ["pong", "gap", "resumed", "auth_ok", "sectors_updated"]) {
  test(`a backend's event of type ${type} is an event`, async () => {
    const client = await open();
    client.socket.receive({ type, tenant_id: 1, branch_id: 1 });
    assert.deepEqual(client.of("event"), [{ type, tenant_id: 1, branch_id: 1 }]);
    assert.deepEqual(client.of("gap"), []);
    assert.equal(client.client.lastEventId, "0");
  });
}

test("the text of an event is passed on unchanged", async () => {
  const text = '{"type":"X","tenant_id":1,"data":{"id":9007199254740993}}';
  /** @type {string[]} */
  const texts = [];
  const client = await open({ onEvent: (_, text) => texts.push(text) });
  client.socket.onmessage({ data: text });
  assert.deepEqual(texts, [text]);
});

test("text that is not JSON, or not an object, is ignored", async () => {
  const client = await open();
  for (const data of ["sectors_updated:5", "{", "null", "7", '"x"', "[]"]) {
    client.socket.onmessage({ data });
  }
  assert.equal(client.client.state, "open");
  assert.deepEqual(client.of("event"), []);
});

// Renewal

test("the token is renewed on the connection after four fifths of its lifetime", async () => {
  const tokens = [jwt({ exp: clock.seconds + 100 }), jwt({ exp: clock.seconds + 300 })];
  const second = tokens[1];
  const client = await open({ token: () => tokens.shift() });
  await keepAlive(client, 79.9);
  assert.equal(tokens.length, 1);
  await keepAlive(client, 0.2);
  assert.deepEqual(
    client.socket.sent.filter((text) => text.includes("auth")),
    [JSON.stringify({ type: "auth", token: second })],
  );
  assert.equal(client.client.state, "open");
});

test("the next renewal is computed from the expiry in auth_ok", async () => {
  const exp = clock.seconds + 100;
  const tokens = [jwt({ exp }), jwt({ exp: exp + 1 }), jwt({ exp: exp + 2 })];
  const client = await open({ token: () => tokens.shift() });
  await keepAlive(client, 80.2);
  client.socket.receive({ type: "auth_ok", expires_at: clock.seconds + 4000 });
  await keepAlive(client, 3195);
  assert.equal(tokens.length, 1);
  await keepAlive(client, 10);
  assert.equal(tokens.length, 0);
});

test("after a renewal, a refusal concerns the new token", async () => {
  const fresh = jwt({ exp: clock.seconds + 300 });
  const tokens = [jwt({ exp: clock.seconds + 10 })];
  const client = await open({ token: () => tokens.shift() ?? fresh });
  await clock.pass(8.1);
  client.socket.receive({ type: "auth_ok", expires_at: clock.seconds + 290 });
  client.socket.end(4001, "revoked");
  await clock.pass(60);
  assert.equal(sockets(), 1);
  assert.equal(client.client.state, "refused");
});

test("a renewal without an answer is repeated before the token expires", async () => {
  const exp = clock.seconds + 100;
  const fresh = jwt({ exp: exp + 300 });
  const tokens = [jwt({ exp }), fresh, fresh, fresh];
  const client = await open({ token: () => tokens.shift() });
  await keepAlive(client, 99);
  const renewals = client.socket.sent.filter((text) => text.includes("auth"));
  assert.ok(renewals.length >= 2, `${renewals.length} times`);
});

test("a token that expires during its renewal is replaced by the fresh one", async () => {
  const fresh = jwt({ exp: clock.seconds + 300 });
  const tokens = [jwt({ exp: clock.seconds + 10 })];
  const client = await open({ token: () => tokens.shift() ?? fresh });
  await clock.pass(9.9);
  client.socket.end(4001, "token expired");
  await clock.pass(0.1);
  assert.equal(client.socket.token, fresh);
  assert.equal(client.client.state, "connecting");
});

test("a refusal during a renewal marks neither token as refused", async () => {
  const [first, other] = [jwt({ exp: clock.seconds + 100 }), jwt({ exp: clock.seconds + 100, jti: "2" })];
  const tokens = [first, other];
  /** @type {boolean[]} */
  const calls = [];
  const client = await open({
    token: ({ refused }) => {
      calls.push(refused);
      return tokens.shift() ?? first;
    },
  });
  await keepAlive(client, 81);
  client.socket.end(4001, "bad signature");
  await clock.pass(0.1);
  assert.equal(client.socket.token, first);
  client.socket.admit();
  assert.equal(client.client.state, "open");
  client.socket.end(4001, "token revoked");
  await clock.pass(60);
  assert.deepEqual(calls, [false, false, true, true]);
  assert.equal(client.of("refused")[0].reason, "token revoked");
});

test("a repeated answer to a renewal loses no token", async () => {
  const fresh = jwt({ exp: clock.seconds + 1000 });
  const tokens = [jwt({ exp: clock.seconds + 10 })];
  const client = await open({ token: () => tokens.shift() ?? fresh });
  client.socket.receive({ type: "auth_ok", expires_at: clock.seconds + 5 });
  await clock.pass(8.1);
  for (let answer = 0; answer < 2; answer++) {
    client.socket.receive({ type: "auth_ok", expires_at: clock.seconds + 990 });
  }
  client.socket.end(4001, "revoked");
  await clock.pass(60);
  assert.equal(sockets(), 1);
  assert.equal(client.client.state, "refused");
});

for (const behind of [-600, 0, 600]) {
  for (const life of [120, 900]) {
    for (const iat of [true, false]) {
      const name = `${life} s${iat ? "" : " without iat"}, clock ${behind} s behind`;
      test(`renewal does not depend on the device's clock: ${name}`, async () => {
        const now = () => Math.floor(clock.seconds + behind);
        let minted = 0;
        let expires = 0;
        const client = await open({
          token: () => {
            minted++;
            expires = now() + life;
            return jwt({ ...(iat && { iat: now() }), exp: expires, jti: `${minted}` });
          },
        });
        for (let passed = 0; passed < 3 * life; passed++) {
          await clock.pass(1, 1000);
          const { socket } = client;
          if (socket.live && clock.seconds + behind >= expires) socket.end(4001, "token expired");
          if (socket.live && client.client.state === "connecting") socket.admit();
          socket.answerPings();
          if (socket.sent.at(-1)?.includes("auth")) {
            socket.receive({ type: "auth_ok", expires_at: expires });
            socket.sent.push("");
          }
        }
        // A short token without iat, and a clock that is behind: only an expiry can tell.
        assert.equal(sockets(), !iat && life === 120 && behind > 0 ? 2 : 1);
        assert.ok(minted >= 3 && minted < (iat ? 15 : 30), `${minted} tokens`);
      });
    }
  }
}

test("nothing is sent if the provider returns the same token, none, or throws", async () => {
  const cached = jwt({ exp: clock.seconds + 100 });
  const answers = [() => cached, () => cached, () => assert.fail("down"), () => null];
  let calls = 0;
  const client = await open({
    token: () => {
      calls++;
      return (answers.shift() ?? (() => cached))();
    },
  });
  await keepAlive(client, 99.9);
  assert.ok(calls < 10, `called ${calls} times`);
  assert.deepEqual(
    client.socket.sent.filter((text) => text.includes("auth")),
    [],
  );
  assert.equal(client.of("error").length, 1);
  assert.equal(client.client.state, "open");
});

test("a clock that is a day ahead does not cause endless renewals", async () => {
  let minted = 0;
  const token = () => {
    minted++;
    const iat = clock.seconds - 24 * HOUR;
    return jwt({ iat, exp: iat + 600, jti: `${minted}` });
  };
  const client = await open({ token });
  for (let minute = 0; minute < 60; minute++) {
    await keepAlive(client, 60);
    if (client.socket.sent.at(-1)?.includes("auth")) {
      client.socket.receive({ type: "auth_ok", expires_at: clock.seconds - 24 * HOUR + 600 });
    }
  }
  assert.ok(minted >= 6 && minted < 20, `${minted} in an hour`);
});

test("a clock that is ahead by almost a token's lifetime causes one renewal a second at most", async () => {
  let minted = 0;
  const client = await open({
    token: () => jwt({ exp: clock.seconds + 0.1, jti: `${minted++}` }),
  });
  for (let passed = 0; passed < 60; passed += 0.1) {
    await clock.pass(0.1);
    if (client.socket.sent.at(-1)?.includes("auth")) {
      client.socket.receive({ type: "auth_ok", expires_at: clock.seconds + 0.1 });
    }
    client.socket.answerPings();
  }
  assert.ok(minted > 1 && minted <= 61, `${minted} in a minute`);
});

test("a token without a readable expiry is not renewed", async () => {
  let calls = 0;
  const client = await open({ token: () => `opaque${++calls}` });
  await keepAlive(client, HOUR);
  assert.equal(calls, 1);
});

/** Answer pings while time passes. @param {TestClient} client @param {number} seconds */
async function keepAlive(client, seconds) {
  for (let passed = 0; passed < seconds; passed += 1) {
    await clock.pass(Math.min(1, seconds - passed));
    client.socket.answerPings();
  }
}

// Heartbeat, sleep, network

test("it pings every 25 seconds, and keeps a socket that answers", async () => {
  const client = await open();
  await keepAlive(client, 200);
  const { pings } = client.socket;
  assert.ok(pings.length >= 7, `${pings.length} pings`);
  assert.equal(sockets(), 1);
});

for (const [heartbeat, receive, every] of [
  [60, 90, 25],
  [20, 90, 10],
  [60, 8, 4],
  [0.1, 90, 0.5],
]) {
  test(`it pings every ${every} s if the gateway's timeouts are ${heartbeat} and ${receive} s`, async () => {
    const client = await open();
    assert.deepEqual(client.socket.sent.slice(1), ['{"type":"intervals"}']);
    client.socket.receive({ type: "intervals", heartbeat_timeout: heartbeat, receive_timeout: receive });
    for (let passed = 0; passed < 20 * every; passed += 0.1) {
      await clock.pass(0.1);
      client.socket.answerPings();
    }
    const pings = client.socket.pings.length;
    assert.ok(pings >= 15 && pings <= 20, `${pings} pings`);
    assert.deepEqual(client.of("event"), []);
  });
}

test("invalid intervals are ignored", async () => {
  const client = await open();
  for (const bad of ["x", -1, null, 0, {}]) {
    client.socket.receive({ type: "intervals", heartbeat_timeout: bad, receive_timeout: 90 });
  }
  await clock.pass(24);
  assert.deepEqual(client.socket.pings, []);
  await clock.pass(1.1);
  assert.equal(client.socket.sent.at(-1), client.socket.pings[0]);
});

test("a socket that does not answer is replaced, and its later messages are ignored", async () => {
  setRandom(0);
  const client = await open();
  const first = client.socket;
  const { onmessage, onclose } = first;
  await clock.pass(34.9);
  assert.equal(sockets(), 1);
  await clock.pass(0.3);
  assert.equal(sockets(), 2);
  assert.equal(live(), 1);
  assert.deepEqual(client.of("close"), [{ code: 1006, reason: "no answer to a ping", retryIn: 0 }]);
  assert.ok(onmessage && onclose);
  assert.equal(first.onmessage, null);
  assert.equal(first.onclose, null);
});

test("other messages give the pong more time, and after the pong there is time until the next ping", async () => {
  const client = await open();
  await clock.pass(26);
  for (let n = 0; n < 5; n++) {
    client.socket.receive({ type: n % 2 ? "CART_CLEARED" : "pong", tenant_id: 1 }); // events
    await clock.pass(9.5);
  }
  client.socket.receive({ type: "pong" });
  await clock.pass(34);
  assert.equal(sockets(), 1);
});

test("a message that was on its way before the ping is no answer to it", async () => {
  setRandom(0);
  const client = await open();
  client.page.show(true);
  client.socket.receive({ type: "pong", tenant_id: 1 }); // an event
  await clock.pass(2.9);
  assert.equal(sockets(), 1);
  await clock.pass(0.3);
  assert.equal(sockets(), 2);
});

test("the pong to an earlier ping is no answer to a later one", async () => {
  setRandom(0);
  const client = await open();
  await clock.pass(25.1);
  client.page.show(true);
  client.socket.receive({ type: "pong" });
  await clock.pass(3.2);
  assert.equal(sockets(), 2);
});

test("after a sleep a ping must be answered in three seconds", async () => {
  setRandom(0);
  const client = await open();
  await clock.pass(20);
  clock.sleep(HOUR);
  await clock.pass(5);
  assert.ok(isPing(client.socket.sent.at(-1)));
  await clock.pass(2.9);
  assert.equal(sockets(), 1);
  await clock.pass(0.3);
  assert.equal(sockets(), 2);
});

test("a sleep between ping and answer does not count as silence of the gateway", async () => {
  const client = await open();
  await clock.pass(25);
  clock.sleep(HOUR);
  await clock.pass(10);
  assert.equal(sockets(), 1);
  client.socket.answerPings();
  await clock.pass(20);
  assert.equal(sockets(), 1);
  assert.equal(client.client.state, "open");
});

for (const [name, trigger] of /** @type {[string, (page: FakePage) => void][]} */ ([
  ["shown again", (page) => page.show(true)],
  ["taken from the back-forward cache", (page) => page.dispatchEvent(new Event("pageshow"))],
  ["on another network", (page) => page.network(true)],
])) {
  test(`a page that is ${name} pings at once`, async () => {
    setRandom(0);
    const client = await open();
    trigger(client.page);
    assert.ok(isPing(client.socket.sent.at(-1)));
    client.socket.receive({ type: "pong" });
    await clock.pass(20);
    assert.equal(sockets(), 1);
    trigger(client.page);
    await clock.pass(3.2);
    assert.equal(sockets(), 2);
  });

  test(`a page that is ${name} ends a back-off`, async () => {
    setRandom(0.999);
    const client = await open();
    for (let failed = 0; failed < 6; failed++) {
      client.socket.end(1006);
      if (failed < 5) await untilNext(60);
    }
    await clock.pass(1);
    assert.equal(sockets(), 6);
    trigger(client.page);
    await settle();
    assert.equal(sockets(), 7);
  });
}

test("a page that becomes hidden sends nothing", async () => {
  const client = await open();
  const before = client.socket.sent.length;
  client.page.show(false);
  assert.equal(client.socket.sent.length, before);
});

test("offline it tries at long intervals, and at once when the network is back", async () => {
  setRandom(0.5);
  const client = await open();
  client.page.network(false);
  await clock.pass(3.1);
  assert.equal(client.client.state, "offline");
  assert.equal(client.of("close")[0].retryIn, 45);
  client.page.show(true);
  client.page.dispatchEvent(new Event("offline"));
  await clock.pass(44.8);
  assert.equal(sockets(), 1);
  await clock.pass(0.3);
  assert.equal(sockets(), 2);
  client.socket.fail();
  await clock.pass(HOUR);
  assert.ok(sockets() > 40 && sockets() < 90, `${sockets()} attempts`);
  const before = sockets();
  if (client.socket.live) client.socket.fail();
  client.page.network(true);
  await settle();
  assert.equal(sockets(), before + 1);
});

test("a wrong offline state of the browser is ignored until its next offline event", async () => {
  setRandom(0.5);
  const page = new FakePage();
  page.navigator.onLine = false;
  const client = await open({ page });
  assert.equal(client.client.state, "open");
  client.socket.end(1006);
  assert.equal(client.client.state, "waiting");
  await clock.pass(0.6);
  assert.equal(sockets(), 2);
  client.socket.admit();
  page.network(false);
  client.socket.end(1006);
  assert.equal(client.client.state, "offline");
});

test("a wait becomes longer when the network is lost", async () => {
  setRandom(0.5);
  const client = await open();
  client.socket.end(1006);
  client.page.network(false);
  assert.equal(client.client.state, "offline");
  await clock.pass(44);
  assert.equal(sockets(), 1);
  await clock.pass(2);
  assert.equal(sockets(), 2);
});

test("offline, the hint of the gateway is respected", async () => {
  const client = await open();
  client.page.navigator.onLine = false;
  client.socket.end(1001, "retry in 100.5s");
  await clock.pass(100);
  assert.equal(sockets(), 1);
  await clock.pass(1);
  assert.equal(sockets(), 2);
});

test("a socket that answers is kept although the browser says offline", async () => {
  const client = await open();
  client.page.network(false);
  client.socket.receive({ type: "pong" });
  await clock.pass(20);
  assert.equal(client.client.state, "open");
  assert.equal(sockets(), 1);
});

// A hidden tab

/** Replaces the worker that wakes a hidden page. The test triggers its timers. */
class FakeWorker {
  /** @type {FakeWorker[]} */
  static all = [];
  live = true;
  /** @type {number[]} */
  delays = [];
  /** @type {any} */ onmessage = null;
  /** @type {any} */ onerror = null;

  /** @param {URL | string} url */
  constructor(url) {
    this.url = String(url);
    FakeWorker.all.push(this);
  }

  /** @param {number} after milliseconds */
  postMessage(after) {
    this.delays.push(after);
  }

  terminate() {
    this.live = false;
  }
}

/** @param {any} [worker] */
const hide = async (worker = FakeWorker) => {
  FakeWorker.all = [];
  /** @type {any} */ (globalThis).Worker = worker; // Node has none
  const client = await open();
  client.page.show(false);
  await clock.pass(5.1);
  return client;
};

test("a hidden page is woken by a worker, which gets the delay of every timer", async () => {
  const client = await hide();
  const [worker] = FakeWorker.all;
  assert.match(worker.url, /^blob:/);
  assert.equal(worker.delays[0], 0);
  assert.ok(worker.delays.slice(1).every((wait) => wait > 19_000 && wait <= 20_010));
  clock.sleep(21); // the page's own timers are delayed
  worker.onmessage({});
  assert.ok(isPing(client.socket.sent.at(-1)));
  assert.equal(worker.delays.at(-1), 10_010);
  clock.sleep(2);
  client.socket.receive({ type: "pong" });
  clock.sleep(25.1);
  worker.onmessage({});
  assert.equal(client.socket.pings.length, 2);
  assert.equal(sockets(), 1);
});

test("a worker that wakes a page too early, or for a timer that was cleared, does nothing", async () => {
  const client = await hide();
  const before = client.socket.sent.length;
  FakeWorker.all[0].onmessage({});
  assert.equal(client.socket.sent.length, before);
  client.client.close();
  FakeWorker.all[0].onmessage({});
  assert.equal(client.socket.sent.length, before);
});

test("the worker ends when the page is shown, and with the client", async () => {
  const client = await hide();
  client.page.show(true);
  assert.deepEqual(FakeWorker.all.map((worker) => worker.live), [false]);
  client.socket.receive({ type: "pong" });
  client.page.show(false);
  await clock.pass(5.1);
  client.client.close();
  assert.deepEqual(FakeWorker.all.map((worker) => worker.live), [false, false]);
});

test("a page that is hidden for a moment, or closing, starts no worker", async () => {
  const client = await hide();
  client.page.show(true);
  client.socket.receive({ type: "pong" });
  client.page.show(false);
  await clock.pass(4);
  client.page.show(true);
  client.socket.receive({ type: "pong" });
  await clock.pass(4);
  client.page.show(false);
  client.client.close();
  await clock.pass(10);
  assert.equal(FakeWorker.all.length, 1);
});

const forbidden = class {
  constructor() {
    throw new DOMException("Refused to create a worker", "SecurityError");
  }
};
for (const [name, worker] of /** @type {[string, any][]} */ ([
  ["throws", forbidden],
  ["fails", FakeWorker],
  ["is missing", undefined],
])) {
  test(`if the worker ${name}, a received message wakes a hidden page`, async () => {
    const client = await hide(worker);
    FakeWorker.all[0]?.onerror({});
    clock.sleep(21);
    client.socket.receive({ type: "CART_CLEARED", tenant_id: 1 });
    await settle();
    assert.ok(isPing(client.socket.sent.at(-1)));
    client.socket.receive({ type: "pong" });
    assert.equal(client.client.state, "open");
    assert.equal(sockets(), 1);
  });
}

// One socket a page

test("a second connect of a page to a URL closes the first, whose query may differ", async () => {
  const first = await open({ url: "wss://gateway.example/ws/waiter?a=1" });
  const second = new TestClient({ url: "wss://gateway.example/ws/waiter", page: first.page });
  clients.push(second);
  assert.equal(live(), 0);
  await settle();
  assert.equal(live(), 1);
  assert.equal(first.client.state, "closed");
  await clock.pass(60);
  first.page.show(true);
  await settle();
  assert.equal(live(), 1);
});

test("each URL and each page has its own socket, and so has each connect without a page", async () => {
  const first = await open();
  const more = [
    { url: "wss://gateway.example/ws/kitchen", page: first.page },
    { page: new FakePage() },
    { page: null },
    { page: null },
  ];
  for (const options of more) await open(options);
  assert.equal(live(), 5);
});

test("closing a replaced client does not unregister its successor", async () => {
  const first = await open();
  const second = await open({ page: first.page });
  first.client.close();
  await open({ page: first.page });
  assert.equal(second.client.state, "closed");
  assert.equal(live(), 1);
});

// Sectors

test("refreshSectors sends the request and returns the answer", async () => {
  const { client, socket } = await open();
  const both = Promise.all([client.refreshSectors(), client.refreshSectors()]);
  assert.equal(socket.sent.at(-1), '{"type":"refresh_sectors"}');
  socket.receive({ type: "sectors_updated", sector_ids: [5, 6] });
  assert.deepEqual(await both, [
    [5, 6],
    [5, 6],
  ]);
});

test("refreshSectors rejects without an answer in time, and when the socket is lost", async () => {
  const { client, socket } = await open();
  const late = client.refreshSectors();
  const asserted = assert.rejects(late, /did not answer with the sectors/);
  await clock.pass(10.1);
  await asserted;
  const lost = client.refreshSectors();
  const alsoAsserted = assert.rejects(lost, /did not answer with the sectors/);
  socket.end(1006);
  await alsoAsserted;
  await assert.rejects(client.refreshSectors(), /not connected: waiting/);
});

// Presence

const WAITER = { user_id: "21", endpoint: "waiter", sector_ids: [5], connections: 1, since: 1790000000.5 };
const ADMIN = { user_id: "21", endpoint: "admin", sector_ids: [], connections: 1, since: 1790000001 };
const TABLE = { session_id: 456, table_id: 10, connections: 2 };
/** @param {FakeWebSocket} socket */
const watched = (socket) => socket.sent.filter((text) => text.includes("watch_presence")).map((text) => JSON.parse(text));
const state = { type: "presence", branch_id: 1, users: [WAITER, ADMIN], sessions: [TABLE] };

test("watchPresence passes on everybody who is present, with each change", async () => {
  const { client, socket, calls } = await open();
  /** @type {any[]} */
  const seen = [];
  client.watchPresence(1, (presence) => seen.push(presence));
  assert.deepEqual(watched(socket), [{ type: "watch_presence", branch_id: 1 }]);
  socket.receive(state);
  socket.receive({ type: "presence", branch_id: 1, joined: [], left: [ADMIN] });
  const moved = { ...WAITER, sector_ids: [6, 7] };
  socket.receive({ type: "presence", branch_id: 1, joined: [moved, { ...TABLE, session_id: 457 }], left: [] });
  socket.receive({ type: "presence", branch_id: 2, users: [], sessions: [] });
  assert.deepEqual(seen, [
    { branchId: 1, users: [WAITER, ADMIN], sessions: [TABLE] },
    { branchId: 1, users: [WAITER], sessions: [TABLE] },
    { branchId: 1, users: [moved], sessions: [TABLE, { ...TABLE, session_id: 457 }] },
  ]);
  assert.equal(calls.filter(([name]) => name === "event").length, 0);
});

test("after a reconnect presence is watched again, and the new state replaces the old one", async () => {
  const client = await start();
  /** @type {any[]} */
  const seen = [];
  client.client.watchPresence(1, (presence) => seen.push(presence.users.length));
  assert.deepEqual(watched(client.socket), []); // not before it is admitted
  client.socket.admit();
  client.socket.receive(state);
  client.client.reconnect();
  await settle();
  client.socket.admit();
  assert.deepEqual(watched(client.socket), [{ type: "watch_presence", branch_id: 1 }]);
  client.socket.receive({ ...state, users: [WAITER] });
  assert.deepEqual(seen, [2, 1]);
});

test("changes before the first state are ignored", async () => {
  const { client, socket } = await open();
  client.watchPresence(1, () => assert.fail("there is no state yet"));
  socket.receive({ type: "presence", branch_id: 1, joined: [WAITER], left: [] });
});

test("a branch is watched once for all who watch it, until the last one ends", async () => {
  const { client, socket } = await open();
  /** @type {string[]} */
  const seen = [];
  const endFirst = client.watchPresence(1, () => seen.push("first"));
  socket.receive(state);
  const endSecond = client.watchPresence(1, () => seen.push("second"));
  await settle();
  assert.deepEqual(seen, ["first", "first", "second"]); // the second one need not wait for a change
  endFirst();
  endFirst();
  socket.receive(state);
  assert.deepEqual(seen.slice(3), ["second"]);
  assert.equal(watched(socket).length, 1);
  endSecond();
  assert.deepEqual(watched(socket)[1], { type: "unwatch_presence", branch_id: 1 });
  socket.receive(state);
  assert.equal(seen.length, 4);
});

// Messages of the application

test("the application can send messages, and onMessage gets the answers but no events", async () => {
  /** @type {any[]} */
  const answers = [];
  const client = await start({ onMessage: (message, text) => answers.push([message, text]) });
  assert.throws(() => client.client.send("ping"), /^Error: not connected: connecting$/);
  client.socket.admit();
  answers.length = 0;
  client.client.send({ type: "watch" });
  client.client.send("refresh_sectors");
  assert.deepEqual(client.socket.sent.slice(-2), ['{"type":"watch"}', "refresh_sectors"]);
  client.socket.receive({ type: "statistics", pid: 1 });
  client.socket.onmessage({ data: "sectors_updated:5" });
  client.socket.receive({ type: "ROUND_READY", tenant_id: 1 });
  assert.deepEqual(answers, [
    [{ type: "statistics", pid: 1 }, '{"type":"statistics","pid":1}'],
    [null, "sectors_updated:5"],
  ]);
});

test("reconnect() resumes on another socket at once, unless the gateway has asked to wait", async () => {
  const client = await open();
  client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id: "7" });
  client.client.reconnect();
  await settle();
  assert.equal(live(), 1);
  client.socket.open();
  assert.equal(client.socket.sent[0], '{"type":"resume","last_event_id":"7"}');
  client.socket.end(1001, "retry in 10.5s");
  client.client.reconnect();
  await clock.pass(10);
  assert.equal(sockets(), 2);
  await clock.pass(1);
  assert.equal(sockets(), 3);
  client.socket.admit();
  clock.sleep(-HOUR);
  client.client.reconnect();
  await settle();
  assert.equal(sockets(), 4);
  client.client.close();
  client.client.reconnect();
  await settle();
  assert.equal(live(), 0);
});

// The end

test("close() ends socket, timers and listeners", async () => {
  const client = await open();
  client.client.close();
  assert.equal(client.client.state, "closed");
  assert.equal(live(), 0);
  const before = client.calls.length;
  assert.deepEqual(client.calls.at(-1), ["state", "closed"]);
  client.page.show(true);
  client.page.network(true);
  await clock.pass(HOUR);
  client.client.close();
  assert.equal(client.calls.length, before);
  assert.equal(sockets(), 1);
});

test("close() right after connect() opens no socket", async () => {
  const client = new TestClient();
  client.client.close();
  await clock.pass(60);
  assert.equal(sockets(), 0);
});

for (const name of ["onEvent", "onGap", "onState", "onClose", "onError"]) {
  test(`close() inside ${name} is final`, async () => {
    setRandom(0);
    let calls = 0;
    const tokens = ["token"];
    const client = await start({
      token: () => tokens.shift() ?? assert.fail("down"),
      [name]: () => {
        calls++;
        client.client.close();
      },
    });
    client.socket.admit({ recovered: false });
    client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id: "1" });
    client.socket.receive({ type: "ROUND_READY", tenant_id: 1, event_id: "2" });
    client.socket.end(1006);
    await clock.pass(HOUR);
    assert.equal(calls, name === "onState" ? 2 : 1);
    assert.equal(client.client.state, "closed");
    assert.equal(live(), 0);
  });
}

test("close() at the start of another attempt is final", async () => {
  setRandom(0);
  let calls = 0;
  const client = await open({
    token: () => `${++calls}`,
    onState: (state) => state === "connecting" && client.client.close(),
  });
  client.socket.end(1006);
  await clock.pass(HOUR);
  assert.equal(client.client.state, "closed");
  assert.equal(calls, 1);
  assert.equal(sockets(), 1);
});

test("close() in the refused state stops later callbacks and keeps the state", async () => {
  const events = /** @type {string[]} */ ([]);
  const client = await open({ onState: (state) => state === "refused" && client.client.close() });
  client.client.addEventListener("refused", () => events.push("refused"));
  client.socket.end(4003);
  assert.equal(client.client.state, "refused");
  assert.deepEqual([...events, ...client.of("refused")], []);
});

test("onRefused may connect again", async () => {
  const page = new FakePage();
  const again = new Promise((resolve) => {
    open({ page, onRefused: () => resolve(start({ page, token: "fresh" })) });
  });
  await settle();
  FakeWebSocket.all[0].end(4003);
  const second = await again;
  second.socket.admit();
  assert.equal(second.socket.token, "fresh");
  assert.deepEqual(
    clients.map(({ client }) => client.state),
    ["refused", "open"],
  );
  await start({ page });
  assert.equal(second.client.state, "closed");
});

test("addEventListener gets the same events", async () => {
  const { client, socket } = await open();
  /** @type {unknown[]} */
  const received = [];
  client.addEventListener("event", ({ detail }) => received.push(detail.event.type));
  client.addEventListener("gap", ({ detail }) => received.push(detail));
  socket.receive({ type: "ROUND_READY", tenant_id: 1 });
  socket.receive({ type: "gap" });
  assert.deepEqual(received, ["ROUND_READY", "lost"]);
});

// Random sequences

/** Reproducible numbers from 0 to 1 (mulberry32). @param {number} seed */
const numbers = (seed) => () => {
  seed = (seed + 0x6d2b79f5) | 0;
  let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
  mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
  return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
};

test("after any sequence of events: one socket at most, no early attempt, and open in the end", async () => {
  for (let seed = 0; seed < 60; seed++) {
    const number = numbers(seed);
    mock.method(Math, "random", number);
    /** @param {readonly any[]} choices */
    const choose = (choices) => choices[Math.floor(number() * choices.length)];
    FakeWebSocket.all = [];
    let notBefore = 0;
    const client = await start({ token: () => jwt({ exp: clock.seconds + 300, jti: `${number()}` }) });
    /** @type {Record<string, () => void>} */
    const actions = {
      admit: () => client.socket.live && client.client.state === "connecting" && client.socket.admit(),
      end: () => {
        if (!client.socket.live) return;
        client.socket.end(choose([1000, 1006, 1011, 1013, 4001, 4008, 4009]));
        notBefore = 0;
      },
      hint: () => {
        if (!client.socket.live) return;
        client.socket.end(1001, "retry in 12.5s");
        notBefore = clock.seconds + 12.5;
      },
      flood: () => {
        if (!client.socket.live) return;
        client.socket.end(4029);
        notBefore = clock.seconds + 30;
      },
      pong: () => client.socket.live && client.socket.onmessage?.({ data: '{"type":"pong"}' }),
      show: () => client.page.show(choose([true, false])),
      network: () => client.page.network(choose([true, false])),
      sleep: () => clock.sleep(choose([1, 60, 4000])),
    };
    for (let step = 0; step < 40; step++) {
      const before = sockets();
      const name = choose(Object.keys(actions));
      actions[name]();
      await clock.pass(choose([0, 0.1, 0.5, 3]));
      const story = `seed ${seed}, step ${step}, ${name}`;
      assert.ok(live() <= 1, `${live()} sockets: ${story}`);
      if (sockets() > before) assert.ok(clock.seconds >= notBefore, `too early: ${story}`);
    }
    client.page.network(true);
    for (let passed = 0; client.client.state !== "open" && passed < 200; passed++) {
      await clock.pass(0.5);
      actions.admit();
    }
    assert.equal(client.client.state, "open", `seed ${seed}`);
    client.client.close();
    assert.equal(live(), 0, `seed ${seed}`);
  }
});
