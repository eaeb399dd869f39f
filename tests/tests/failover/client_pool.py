"""An app's pool of connections under load: each thread writes again and again, until SIGTERM. For each write it prints
MEMBER NUMBER and the port of the server that has acknowledged it, or why nobody did; for each connection that it could
not make, that and why.
python3 client_pool.py redis|postgres ADDRESS PORT MEMBERS"""

import concurrent.futures
import signal
import sys
import threading
import time

ADDRESS, PORT, MEMBERS = sys.argv[2], *map(int, sys.argv[3:])
PACE = 0.002
# Longer than any call may take here: what fails has been told so.
PATIENCE = 30


def tell(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def redis_pool():
    import redis

    class Connection(redis.Connection):
        def connect(self):
            try:
                super().connect()
            except redis.RedisError as error:
                tell("unconnected", error)
                raise

    times = {"timeout": PATIENCE, "socket_timeout": PATIENCE, "socket_connect_timeout": PATIENCE}
    client = redis.Redis(
        connection_pool=redis.BlockingConnectionPool(
            connection_class=Connection, max_connections=MEMBERS, host=ADDRESS, port=PORT, **times
        )
    )

    def write(name):
        # Which server it is, is asked in the transaction that writes.
        transaction = client.pipeline(transaction=True)
        transaction.incr("count").sadd("written", name).echo(name).config_get("port")
        count, added, echo, server = transaction.execute()
        assert count > 0 and added == 1 and echo == name.encode(), (name, count, added, echo)
        return server["port"]

    return write, (redis.ConnectionError, redis.TimeoutError)


def postgres_pool():
    import psycopg
    import psycopg_pool

    class Connection(psycopg.Connection):
        @classmethod
        def connect(cls, *words, **options):
            try:
                return super().connect(*words, **options)
            except psycopg.OperationalError as error:
                tell("unconnected", " ".join(str(error).split()))
                raise

    pool = psycopg_pool.ConnectionPool(
        f"host={ADDRESS} port={PORT} user=postgres sslmode=disable",
        connection_class=Connection,
        min_size=MEMBERS,
        timeout=PATIENCE,
    )

    def write(name):
        insert = "insert into written values (%s) returning name, inet_server_port()"
        with pool.connection() as connection:
            echo, server = connection.execute(insert, [name]).fetchone()
        assert echo == name, (name, echo)
        return server

    return write, psycopg.OperationalError


def call(member, write, failures, over):
    number = 0
    while not over.is_set():
        try:
            outcome = write(f"{member}-{number}")
        except failures as error:
            outcome = " ".join(f"{type(error).__name__}: {error}".split())
        tell(member, number, outcome)
        number += 1
        time.sleep(PACE)


def main():
    sys.stdout.reconfigure(line_buffering=True)
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    write, failures = {"redis": redis_pool, "postgres": postgres_pool}[sys.argv[1]]()
    with concurrent.futures.ThreadPoolExecutor(MEMBERS) as threads:
        calls = [threads.submit(call, member, write, failures, over) for member in range(MEMBERS)]
        # A wrong answer ends it, too.
        concurrent.futures.wait(calls, return_when=concurrent.futures.FIRST_EXCEPTION)
        over.set()
    for one in calls:
        one.result()


main()
