// uWebSockets, in Bun: one topic, to which every client subscribes.
import { RedisClient } from "bun";

const [port, redisPort] = process.argv.slice(-2).map(Number);
const server = Bun.serve({
  hostname: "127.0.0.1",
  port,
  fetch: (request, server) => (server.upgrade(request) ? undefined : new Response("upgrade")),
  websocket: {
    perMessageDeflate: false,
    backpressureLimit: 16 << 20,
    idleTimeout: 0,
    sendPings: false,
    open: (client) => client.subscribe("room"),
    message: (client, text) => text === "ping" && client.send('{"type":"pong"}'),
  },
});
const redis = new RedisClient(`redis://127.0.0.1:${redisPort}`);
await redis.connect();
await redis.subscribe("channel:branch:1:waiters", (text) => server.publish("room", text));
