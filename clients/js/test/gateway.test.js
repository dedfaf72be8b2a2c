import assert from "node:assert/strict";
import { after, afterEach, before, test } from "node:test";

import { connect } from "../../../trio_gateway/static/client.js";
import { Gateway, Told, publish, staffToken } from "./gateway.js";

const gateway = new Gateway();
before(() => gateway.start());
after(() => gateway.stop("SIGTERM"));

/** @type {ReturnType<typeof connect>[]} */
const clients = [];
afterEach(() => clients.splice(0).forEach((client) => client.close()));

/** @param {Partial<import("../../../trio_gateway/static/client.js").Options>} options */
const client = (options = {}) => {
  const told = new Told();
  const connected = connect({
    url: gateway.url("waiter"),
    token: () => staffToken(),
    ...told.listeners,
    ...options,
  });
  clients.push(connected);
  return { told, client: connected };
};

test("it is let in and hears events", async () => {
  const { told } = client();
  await told.letIn();
  await publish({ id: "one" });
  await told.until(() => told.of("event").length);
  assert.equal(told.of("event")[0].id, "one");
});

test("what it missed while the gateway was killed comes once, and in order", async () => {
  const { told } = client({ timings: { backOff: 0.2, longest: 0.2 } });
  await told.letIn();
  await gateway.stop("SIGKILL");
  for (const id of ["a", "b", "c"]) await publish({ id });
  await gateway.start();
  await told.until(() => told.of("event").length >= 3);
  assert.deepEqual(
    told.of("event").map((event) => event.id),
    ["a", "b", "c"],
  );
  assert.deepEqual(told.of("gap"), []);
});
