// Validates the AsyncAPI document in a file with AsyncAPI's own parser; status 1 if it isn't one.
const { readFileSync } = require("node:fs");
const { Parser } = require("@asyncapi/parser");

new Parser().parse(readFileSync(process.argv[2], "utf8")).then(({ document, diagnostics }) => {
  const found = diagnostics.filter(({ severity }) => severity <= 1); // errors and warnings
  for (const { path, message } of found) console.error(`${path.join(".")}: ${message}`);
  if (!document || found.length > 0) process.exit(1);
  const { length } = document.messages().all();
  console.log(`valid: ${document.channels().all().length} channels, ${length} messages`);
});
