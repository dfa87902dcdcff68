"""Many answers at once: `minke serve` and llama-server in turns, tokens written a second in all.

    pip install openai
    python scripts/bench_serve_compare.py MODEL.gguf --llama-server PATH [--streams 4 8 16]

Every stream asks /v1/completions for 64 tokens behind its own prompt of about 32, greedily; medians of some
rounds. The machine should do nothing else.
"""

import argparse
import asyncio
import socket
import statistics
import subprocess
import time
import urllib.request

import openai

WORDS = "the whale dives and sings while cold water moves over old stones below a quiet northern harbour".split()


def prompt(stream):
    """Another one for each stream, from its first word on."""
    return " ".join(WORDS[(stream + 5 * i) % len(WORDS)] for i in range(stream % 7, 32 + stream % 7))


class Server:
    def __init__(self, command, host):
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.host = host
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://{host}/health") as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.1)
        raise SystemExit(f"does not start: {' '.join(command)}")

    def ask(self, streams, tokens, extra):
        async def run():
            async with openai.AsyncOpenAI(base_url=f"http://{self.host}/v1", api_key="none", timeout=600) as client:
                model = (await client.models.list()).data[0].id

                async def one(stream):
                    answer = await client.completions.create(
                        model=model, prompt=prompt(stream), max_tokens=tokens, temperature=0, extra_body=extra
                    )
                    return answer.usage.completion_tokens

                await one(99)
                start = time.perf_counter()
                written = sum(await asyncio.gather(*(one(stream) for stream in range(streams))))
                return written / (time.perf_counter() - start)

        return asyncio.run(run())

    def stop(self):
        self.process.terminate()
        self.process.wait()


def free_host():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--llama-server", required=True, help="the program of llama.cpp")
    parser.add_argument("--minke", default="target/release/minke")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-repack", action="store_true", help="llama.cpp without its own layouts")
    args = parser.parse_args()
    print("| streams | Minke, tokens/s | llama-server | ratio |\n|---:|---:|---:|---:|")
    for streams in args.streams:
        speeds = [[], []]
        for _ in range(args.rounds):
            for which in range(2):
                host = free_host()
                address, port = host.split(":")
                threads = ["--threads", str(args.threads)]
                if which == 0:
                    command = [args.minke, "serve", args.model, "--addr", host, *threads]
                    extra = {}
                else:
                    # a context of its own for every stream
                    context = ["-c", str(streams * 256), "-np", str(streams)]
                    command = [args.llama_server, "-m", args.model, "--host", address, "--port", port, *threads, *context]
                    command += ["--no-repack"] if args.no_repack else []
                    extra = {"cache_prompt": False}
                server = Server(command, host)
                try:
                    speeds[which].append(server.ask(streams, args.tokens, extra))
                finally:
                    server.stop()
        ours, theirs = map(statistics.median, speeds)
        print(f"| {streams} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
