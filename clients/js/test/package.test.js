/** The package as npm would publish it. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const run = promisify(execFile);
const HERE = fileURLToPath(new URL("..", import.meta.url));
const SOURCES = fileURLToPath(new URL("../../../trio_gateway/static/", import.meta.url));

/** A project with the packed package installed. */
let project = "";
/** @type {{ files: { path: string }[], filename: string }} */
let packed;

before(async () => {
  project = await mkdtemp(join(tmpdir(), "client-"));
  const { stdout } = await run("npm", ["pack", "--json", "--pack-destination", project], { cwd: HERE });
  [packed] = JSON.parse(stdout.slice(stdout.indexOf("[")));
  await writeFile(join(project, "package.json"), '{"type":"module"}');
  await run("npm", ["install", "--offline", "--no-audit", join(project, packed.filename)], {
    cwd: project,
  });
});
after(() => rm(project, { recursive: true }));

test("the package contains the client, its types and the files that npm adds, and no other", () => {
  assert.deepEqual(packed.files.map(({ path }) => path).sort(), [
    "README.md",
    "client.d.ts",
    "client.js",
    "package.json",
  ]);
});

for (const name of ["client.js", "client.d.ts"]) {
  test(`its ${name} is the file that the gateway serves`, async () => {
    const installed = await readFile(join(project, "node_modules/trio-gateway-client", name), "utf8");
    assert.equal(installed, await readFile(join(SOURCES, name), "utf8"));
  });
}

test("it can be imported by its name", async () => {
  const script = 'import("trio-gateway-client").then((all) => console.log(Object.keys(all).join()))';
  const { stdout } = await run(process.execPath, ["-e", script], { cwd: project });
  assert.equal(stdout.trim(), "afterClose,connect");
});

test("TypeScript finds its types for browsers and Node, and rejects wrong options", async () => {
  await writeFile(
    join(project, "right.ts"),
    `import { connect, type GatewayEvent, type State } from "trio-gateway-client";
     const gateway = connect({
       url: new URL("wss://gateway.example/ws/waiter"),
       token: async ({ refused }) => (refused ? null : "token"),
       onEvent: (event: GatewayEvent, text: string) => console.log(event.type.length, text.length),
       onGap: (reason: "lost" | "not_recovered") => console.log(reason),
       onClose: ({ code, retryIn }) => console.log(code, retryIn ?? 0),
       timings: { ping: 20 },
     });
     const state: State = gateway.state;
     gateway.addEventListener("event", ({ detail: { event } }) => console.log(event.event_id, state));
     gateway.refreshSectors().then((sectors: number[]) => gateway.close());`,
  );
  await writeFile(
    join(project, "wrong.ts"),
    `import { connect } from "trio-gateway-client";
     connect({ url: "/ws/waiter" });
     connect({ url: "/ws/waiter", token: 7 });
     connect({ url: "/ws/waiter", token: "t", onGap: (reason: number) => {} });`,
  );
  const tsc = join(HERE, "node_modules/.bin/tsc");
  const options = ["--strict", "--noEmit", "--module", "nodenext"];
  const browser = [...options, "--lib", "es2022,dom", "--types", ""];
  const node = [...options, "--lib", "es2022", "--types", "node"];
  node.push("--typeRoots", join(HERE, "node_modules/@types"));
  await run(tsc, [...browser, "right.ts"], { cwd: project });
  await run(tsc, [...node, "right.ts"], { cwd: project });
  const wrong = await run(tsc, [...browser, "wrong.ts"], { cwd: project }).then(
    () => assert.fail("tsc found no error"),
    ({ stdout }) => [...stdout.matchAll(/^wrong\.ts\((\d+)/gm)].map(([, line]) => line),
  );
  assert.deepEqual(wrong, ["2", "3", "4"]);
});
