"""Asks `minke serve` with OpenAI's own client, and checks every answer.

    python scripts/check_serve.py [--minke target/release/minke] [--model FOLDER]

Needs openai (pip install openai); without --model also torch, transformers and tokenizers, to make a small model with
random weights. Ends with the number of checks, and with exit code 1 at the first that fails.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import openai
from pydantic import BaseModel

TEMPLATE = """{% if tools %}<|user|>tools: {{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>\
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""

CHECKS = 0


def check(condition, what):
    global CHECKS
    CHECKS += 1
    if not condition:
        raise SystemExit(f"FAILED: {what}")


def make_model(folder):
    """A llama of two layers with random weights, a byte-level tokenizer, and a template that knows tools."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>", "<think>", "</think>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the whale dives and the whale sings, twice a day\n"] * 50, trainer)
    size = tokenizer.get_vocab_size()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, initializer_range=0.3,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": names[0], "eos_token": names[1], "chat_template": TEMPLATE}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class Server:
    def __init__(self, minke, model, *extra):
        command = [minke, "serve", str(model), "--addr", "127.0.0.1:0", "--name", "whale", *extra]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            if found := re.search(r"http://(\S+)/v1", line):
                self.host = found[1]
                return
        raise SystemExit(f"FAILED: the server did not start: {' '.join(command)}")

    def client(self, kind=openai.OpenAI):
        return kind(base_url=f"http://{self.host}/v1", api_key="none", max_retries=0, timeout=120)

    def health(self):
        with urllib.request.urlopen(f"http://{self.host}/health") as response:
            return json.load(response)

    def wait(self, what, holds):
        end = time.time() + 30
        while not holds(self.health()):
            check(time.time() < end, f"{what}: {self.health()}")
            time.sleep(0.02)

    def stop(self):
        self.process.send_signal(2)
        check(self.process.wait(30) == 0, "Ctrl-C ends the server with exit code 0")


def fails(error, code, call):
    try:
        call()
    except error as got:
        check(got.code == code, f"code {got.code!r}, expected {code!r}: {got}")
        return str(got)
    check(False, f"expected {error.__name__}")


def chats(client):
    messages = [{"role": "system", "content": "sing"}, {"role": "user", "content": "the whale"}]
    ask = dict(model="whale", messages=messages, max_tokens=40, seed=7, temperature=0.9)
    whole = client.chat.completions.create(**ask, n=2, logprobs=True, top_logprobs=3)
    first, second = whole.choices
    check(first.message.model_dump() != second.message.model_dump(), "n answers differ")
    check(first.finish_reason == "length" and whole.usage.completion_tokens == 80, "length and usage")
    check(len(first.logprobs.content) == 40 and len(first.logprobs.content[3].top_logprobs) == 3, "log-probabilities")
    check(all(entry.logprob <= 0 for entry in first.logprobs.content), "log-probabilities are at most 0")
    text = b"".join(bytes(entry.bytes) for entry in first.logprobs.content).decode(errors="replace")
    check(text == first.message.content or "<|" in text, "the bytes of the tokens are the text")
    parts, usage = ["", ""], None
    for chunk in client.chat.completions.create(**ask, n=2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    check(parts == [first.message.content, second.message.content], "a stream is the whole in parts")
    check(usage.total_tokens == whole.usage.total_tokens, "usage at the end of a stream")
    again = client.chat.completions.create(**ask)
    check(again.choices[0].message.content == first.message.content, "a seed names an answer")
    greedy = [client.chat.completions.create(**{**ask, "temperature": 0, "seed": s}) for s in (1, 2)]
    check(greedy[0].choices[0].message.content == greedy[1].choices[0].message.content, "greedy has no seed")
    stop = greedy[0].choices[0].message.content[5:8]
    cut = client.chat.completions.create(**{**ask, "temperature": 0}, stop=[stop])
    check(cut.choices[0].finish_reason == "stop", "a stop string ends an answer")
    check(cut.choices[0].message.content == greedy[0].choices[0].message.content.split(stop)[0], "and is no part of it")
    tools = [{"type": "function", "function": {"name": "dive", "parameters": {"type": "object", "properties": {}}}}]
    with_tools = client.chat.completions.create(**ask, tools=tools)
    check(with_tools.usage.prompt_tokens > again.usage.prompt_tokens + 20, "the template is told the tools")
    # the next turn finds the last one
    told = messages + [{"role": "assistant", "content": "x" * 300}, {"role": "user", "content": "and"}]
    client.chat.completions.create(**{**ask, "messages": told})
    told += [{"role": "assistant", "content": "y"}, {"role": "user", "content": "so"}]
    turn = client.chat.completions.create(**{**ask, "messages": told})
    check(turn.usage.prompt_tokens_details.cached_tokens >= 64, f"the next turn reads less: {turn.usage}")


def thoughts(client):
    """A thought of ten tokens at most, apart from the answer, whole and in parts."""
    ask = dict(
        model="whale", messages=[{"role": "user", "content": "the whale"}], max_tokens=40, seed=3, temperature=0.9,
        extra_body={"thinking_budget": 10, "chat_template_kwargs": {"enable_thinking": True}},
    )
    message = client.chat.completions.create(**ask).choices[0].message
    check(message.reasoning_content and message.content, f"a thought and an answer: {message}")
    check("think>" not in message.reasoning_content + message.content, "marks of a thought are in neither")
    parts = {"reasoning_content": "", "content": ""}
    for chunk in client.chat.completions.create(**ask, stream=True):
        for name in parts:
            piece = getattr(chunk.choices[0].delta, name, None) if chunk.choices else None
            check(not piece or name == "content" or not parts["content"], "a thought comes before its answer")
            parts[name] += piece or ""
    check(parts["reasoning_content"] == message.reasoning_content, "a streamed thought is the whole in parts")
    check(parts["content"] == message.content, "and so is the answer behind it")
    without = client.chat.completions.create(**{**ask, "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}})
    check(not getattr(without.choices[0].message, "reasoning_content", None), "no thought where none is wanted")


def forms(client):
    class Whale(BaseModel):
        is_large: bool
        name: str

    schema = Whale.model_json_schema()
    schema["additionalProperties"] = False
    schema["properties"]["name"]["enum"] = ["blue", "minke"]
    form = {"type": "json_schema", "json_schema": {"name": "whale", "schema": schema, "strict": True}}
    ask = dict(model="whale", messages=[{"role": "user", "content": "which"}], max_tokens=200, seed=1)
    for seed in range(5):
        answer = client.chat.completions.create(**{**ask, "seed": seed}, response_format=form).choices[0]
        check(Whale.model_validate_json(answer.message.content).name in ("blue", "minke"), "JSON of the schema")
        check(answer.finish_reason == "stop", "JSON that is complete ends the answer")


def texts(client):
    ask = dict(model="whale", prompt=["the whale", "a day"], max_tokens=20, temperature=0)
    whole = client.completions.create(**ask, logprobs=2)
    check([choice.index for choice in whole.choices] == [0, 1], "an answer to each prompt")
    check(len(whole.choices[1].logprobs.token_logprobs) == 20, "log-probabilities of a text")
    parts = ["", ""]
    for chunk in client.completions.create(**ask, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    check(parts == [choice.text for choice in whole.choices], "a stream of a text is the whole in parts")
    banned = client.completions.create(**ask, logit_bias={str(i): -100 for i in range(60, 200)})
    check(banned.choices[0].text != whole.choices[0].text, "a bias has an effect")
    flat = client.completions.create(**ask, frequency_penalty=2, presence_penalty=2)
    check(flat.choices[0].text != whole.choices[0].text, "a penalty has an effect")


def errors(server, client):
    ask = dict(model="whale", messages=[{"role": "user", "content": "the"}])
    create = client.chat.completions.create
    message = fails(openai.NotFoundError, "model_not_found", lambda: create(**{**ask, "model": "shark"}))
    check("`shark`" in message and "`whale`" in message, "both names are told")
    message = fails(openai.BadRequestError, "context_length_exceeded", lambda: create(**ask, max_tokens=5000))
    check("5000" in message and str(client.models.list().data[0].context_length) in message, "both lengths are told")
    fails(openai.BadRequestError, None, lambda: create(**ask, temperature=-1))
    fails(openai.BadRequestError, None, lambda: create(**ask, extra_body={"unknown": 1}))
    fails(openai.BadRequestError, None, lambda: create(model="whale", messages=[]))
    check(client.models.list().data[0].id == "whale", "the list of models")
    check(client.models.retrieve("whale").id == "whale", "a model by name")
    # a client that goes away
    stream = create(**ask, max_tokens=1900, stream=True, extra_body={"min_tokens": 1900})
    next(iter(stream))
    check(server.health()["running"] == 1, "it runs")
    tokens = server.health()["tokens"]
    stream.close()
    server.wait("who goes away cancels", lambda health: health["running"] == 0)
    check(server.health()["tokens"] - tokens < 1800, "before its end")


async def crowd(server):
    """Many at once say what each says alone."""
    client = server.client(openai.AsyncOpenAI)

    def ask(seed):
        messages = [{"role": "user", "content": "the whale sings " * (seed % 5 * 8 + 1)}]
        return client.chat.completions.create(
            model="whale", messages=messages, max_tokens=30, seed=seed, extra_body={"priority": seed % 3}
        )

    alone = [(await ask(seed)).choices[0].message.content for seed in range(16)]
    together = await asyncio.gather(*(ask(seed % 16) for seed in range(48)))
    check([one.choices[0].message.content for one in together] == alone * 3, "alone as in a crowd")


def busy(minke, model):
    server = Server(minke, model, "--parallel", "1", "--queue", "1")
    client = server.client()
    ask = dict(model="whale", prompt="the", max_tokens=1900, stream=True, extra_body={"min_tokens": 1900})
    streams = [client.completions.create(**ask)]
    server.wait("one runs", lambda health: health["running"] == 1)
    streams.append(client.completions.create(**ask))
    # the second one waits, so there is no room for a third
    fails(openai.RateLimitError, "rate_limit_exceeded", lambda: client.completions.create(**{**ask, "stream": False}))
    for stream in streams:
        stream.close()
    server.wait("both are cancelled", lambda health: health["running"] + health["waiting"] == 0)
    server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minke", default="target/release/minke")
    parser.add_argument("--model", type=Path, help="one with a chat template, whose thoughts are marked [default: a random one]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            model = Path(folder)
            make_model(model)
        server = Server(args.minke, model)
        try:
            client = server.client()
            chats(client)
            thoughts(client)
            forms(client)
            texts(client)
            errors(server, client)
            asyncio.run(crowd(server))
        finally:
            server.stop()
        busy(args.minke, model)
    print(f"{CHECKS} checks passed with openai {openai.__version__}")


if __name__ == "__main__":
    sys.exit(main())
