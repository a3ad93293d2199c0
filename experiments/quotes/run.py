"""Does a quote of the user's files hold the answer? Sentences from an index, and a model that is asked to quote.

    python -m experiments.quotes.run --squad xquad.en.json      half an hour of one core; resumable
    python -m experiments.quotes.run --squad xquad.en.json --asked 60      the model answers so many questions
    python -m experiments.quotes.run --squad xquad.en.json --smoke      a check that it runs

Each paragraph of the file is a document. Every question is answered with one sentence of the index: by common words, by the
vectors of an encoder, and by both. A model gets the passage of the best sentence and is asked for one exact quote; a gate drops
what is not in the file. Last, the answer of some documents is changed, the files are indexed again without training, and the
questions are asked again. Answers of the model are kept in ``runs/quotes/``; the table goes to ``results/quotes.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.publishing import write_json
from pondera.data.packed_files import opened
from pondera.evaluation.binomial import share_interval
from pondera.inference.generate import generate
from pondera.inference.load import load
from pondera.inference.quotes.index import Quote, SpanIndex

PROMPT = "Passage:\n{passage}\n\nQuestion: {question}\nAnswer with one exact quote from the passage and nothing else."
TOKENS = 60
"""Tokens of the model's quote at most."""


@dataclass(frozen=True)
class Asked:
    """A question, the number of its document, and the bytes of its answers there."""

    question: str
    document: int
    answers: tuple[tuple[int, int], ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True, help="a file in the form of SQuAD")
    parser.add_argument("--model", default="smollm2", help="as `pondera generate` takes it (default: %(default)s)")
    parser.add_argument("--encoder", default="minilm", help="as `pondera index` takes it (default: %(default)s)")
    parser.add_argument("--asked", type=int, default=120, help="questions to the model (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="few documents, words only; writes to runs/smoke only")
    args = parser.parse_args()
    root = Path("runs/smoke") if args.smoke else Path()
    documents, asked = read(args.squad)
    if args.smoke:
        documents, asked = documents[:8], [one for one in asked if one.document < 8][:12]
    folder = root / "runs" / "quotes" / "documents"
    write(folder, documents)
    rows = [sentences(name, folder, asked, args.encoder) for name in (["words"] if args.smoke else ARMS)]
    encoder = "words" if args.smoke else args.encoder
    chosen = random.Random(0).sample(asked, min(len(asked), 2 if args.smoke else args.asked))
    rows.append(
        quoted_by_a_model(args.model, indexed(folder, encoder), chosen, root / "runs" / "quotes" / "model.json")
    )
    found: dict[str, Any] = {
        "command": f"python -m experiments.quotes.run --squad {args.squad.name} --asked {args.asked}",
        "model": args.model,
        "encoder": encoder,
        "documents": len(documents),
        "questions": len(asked),
        "rows": rows,
        "changed": after_changes(folder, documents, asked, encoder),
    }
    write_json(root / "results" / "quotes.json", found)
    print(json.dumps(found, indent=1))


ARMS = ("words", "vectors", "words and vectors")


def read(file: Path) -> tuple[list[str], list[Asked]]:
    """The paragraphs and their questions."""
    with opened(file) as source:
        tree = json.load(source)
    documents: list[str] = []
    asked = []
    for article in tree["data"]:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            for one in paragraph["qas"]:
                first = [(len(text[: a["answer_start"]].encode()), len(a["text"].encode())) for a in one["answers"]]
                places = tuple((start, start + size) for start, size in first)
                asked.append(Asked(one["question"], len(documents), places))
            documents.append(text)
    return documents, asked


def write(folder: Path, documents: list[str]) -> None:
    """One file for each paragraph."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, text in enumerate(documents):
        (folder / name_of(number)).write_bytes(text.encode())


def name_of(document: int) -> str:
    return f"{document:04}.txt"


def indexed(folder: Path, encoder: str) -> SpanIndex:
    index = SpanIndex(encoder)
    index.add([folder])
    return index


def sentences(arm: str, folder: Path, asked: list[Asked], encoder: str) -> dict[str, Any]:
    """The best sentence of all documents."""
    index = indexed(folder, "words" if arm == "words" else encoder)
    if arm == "vectors":
        index.words_weight = 0.0
    index.quotes(asked[0].question)  # makes the table
    began = time.perf_counter()
    quotes = [index.quotes(one.question)[0] for one in asked]
    return row(f"sentence, by {arm}", asked, quotes, [is_verbatim(quote) for quote in quotes], began)


def is_verbatim(quote: Quote) -> bool:
    return Path(quote.file).read_bytes()[quote.start : quote.end] == quote.text.encode()


def is_right(one: Asked, quote: Quote | None) -> bool:
    return quote is not None and Path(quote.file).name == name_of(one.document)


def holds(one: Asked, quote: Quote | None) -> bool:
    """Whether a quote has an answer, at its place in its document."""
    return is_right(one, quote) and any(quote.start <= start and end <= quote.end for start, end in one.answers)


def row(name: str, asked: list[Asked], quotes: list[Any], verbatim: list[bool], began: float) -> dict[str, Any]:
    """Shares of all questions, with their 95 % intervals."""
    held = [holds(one, quote) for one, quote in zip(asked, quotes, strict=True)]
    words = [len(quote.text.split()) for quote in quotes if quote is not None]
    return {
        "arm": name,
        "questions": len(asked),
        "verbatim": float(np.mean(verbatim)),
        "right_document": float(np.mean([is_right(one, quote) for one, quote in zip(asked, quotes, strict=True)])),
        "held": float(np.mean(held)),
        "held_interval": list(share_interval(float(np.mean(held)), len(held))),
        "words": float(np.mean(words)) if words else None,
        "seconds": (time.perf_counter() - began) / len(asked),
    }


def quoted_by_a_model(model: str, index: SpanIndex, asked: list[Asked], store: Path) -> dict[str, Any]:
    """A model is asked for an exact quote of the passage with the best sentence; what is not in it is dropped."""
    loaded = load(model, device="cpu")
    known: dict[str, str] = json.loads(store.read_text()) if store.is_file() else {}
    files = {file.path: file for file in index.files}
    quotes: list[Quote | None] = []
    verbatim = []
    began = time.perf_counter()
    for one in asked:
        best = index.quotes(one.question)[0]
        file = files[best.file]
        places = file.passage_P2
        start, end = next(place for place in places.tolist() if place[0] <= best.start and best.end <= place[1])
        text = PROMPT.format(passage=file.text(start, end), question=one.question)
        if one.question not in known:
            prompt = loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            known[one.question] = generate(loaded, str(prompt), TOKENS, temperature=0).text
            write_json(store, known)
        said = re.sub(r'^["“”\s]+|["“”\s]+$', "", known[one.question])
        place = file.content.find(said.encode(), start, end) if said else -1
        verbatim.append(place >= 0)
        quotes.append(Quote(said, best.file, place, place + len(said.encode()), 0.0) if place >= 0 else None)
    return row(f"{model}, asked for a quote of the best sentence's passage", asked, quotes, verbatim, began)


def after_changes(folder: Path, documents: list[str], asked: list[Asked], encoder: str) -> dict[str, Any]:
    """Numbers in documents are changed, the files are added again, and the questions are asked again."""
    index = indexed(folder, encoder)
    changed, before, after = 0, 0, 0
    seconds = 0.0
    for number, text in enumerate(documents):
        content = text.encode()
        found = [
            (one, re.fullmatch(rb"\d{2,4}", content[slice(*one.answers[0])])) for one in asked if one.document == number
        ]
        one, match = next(((one, match) for one, match in found if match), (None, None))
        if one is None or match is None:
            continue
        start, end = one.answers[0]
        value = f"{(int(match[0]) + 7) % 10 ** (end - start):0{end - start}}".encode()
        changed += 1
        before += holds(one, index.quotes(one.question)[0])
        (folder / name_of(number)).write_bytes(content[:start] + value + content[end:])
        began = time.perf_counter()
        index.add([folder / name_of(number)])
        seconds += time.perf_counter() - began
        quote = index.quotes(one.question)[0]
        after += holds(one, quote) and value.decode() in quote.text
    counts = {"documents": changed, "held_before": before, "new_answer_held": after}
    return counts | {"seconds_per_document": seconds / max(changed, 1)}


if __name__ == "__main__":
    main()
