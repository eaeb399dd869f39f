"""Sends noise on many connections at once and expects it back, with asyncio's streams:
python3 asyncio_client.py ADDRESS PORT CONNECTIONS BYTES"""

import asyncio
import random
import sys

ADDRESS, PORT, CONNECTIONS, BYTES = sys.argv[1], *map(int, sys.argv[2:])


async def send(writer, noise, rhythm):
    while noise:
        piece = rhythm.randint(1, 1 << rhythm.randint(0, 18))
        writer.write(noise[:piece])
        noise = noise[piece:]
        await writer.drain()
    writer.write_eof()


async def talk(seed):
    noise = random.Random(seed).randbytes(BYTES)
    reader, writer = await asyncio.open_connection(ADDRESS, PORT)
    sending = asyncio.create_task(send(writer, noise, random.Random(-seed)))
    heard = await reader.read(-1)
    await sending
    writer.close()
    await writer.wait_closed()
    assert heard == noise, f"connection {seed}: {len(heard)} bytes, not as sent"


async def main():
    await asyncio.gather(*(talk(seed) for seed in range(1, CONNECTIONS + 1)))


asyncio.run(main())
