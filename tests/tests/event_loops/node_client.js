// Sends noise on many connections at once and expects it back, with Node's streams:
// node node_client.js ADDRESS PORT CONNECTIONS BYTES

const assert = require("assert");
const crypto = require("crypto");
const net = require("net");
const { once } = require("events");

const [address, ...numbers] = process.argv.slice(2);
const [port, connections, bytes] = numbers.map(Number);

async function talk() {
  const noise = crypto.randomBytes(bytes);
  const socket = net.connect({ host: address, port, allowHalfOpen: true });
  const heard = [];
  socket.on("data", (piece) => heard.push(piece));
  const end = once(socket, "end");
  for (let sent = 0; sent < bytes; ) {
    const piece = noise.subarray(sent, sent + crypto.randomInt(1, 2 << crypto.randomInt(0, 18)));
    sent += piece.length;
    if (!socket.write(piece)) await once(socket, "drain");
  }
  socket.end();
  await end;
  assert.ok(noise.equals(Buffer.concat(heard)), "what came back is not what was sent");
}

Promise.all(Array.from({ length: connections }, talk)).catch((error) => {
  console.error(error);
  process.exit(1);
});
