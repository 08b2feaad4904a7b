"""The card of a trained model: what makes --out a folder to share, written when a run is finished.

    OUT/README.md          the hub's model card: metadata, how to load it, scores, three rationales, settings
    OUT/modules.json       lets sentence-transformers open OUT by the next file
    OUT/grace_module.py    a copy of sentence_transformer.py, which reads as this repository does

`hf upload NAME OUT` then puts it on the hub.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

from config import Config
from evaluation import sentence_transformer
from plumbing.run import read_json, write_atomically

TEXTS = 3
NOT_SHOWN = {  # paths, what only concerned the machine, and what has a place of its own
    "model", "data", "out", "heldout", "graded", "eval_every", "save_every", "resume", "overwrite", "device",
    "tokens_per_batch", "log_to", "instruction",
}  # fmt: skip
CARD = """---
{metadata}
# license: choose one; that of the base model and of the data may leave you no choice
---

<!-- To share this folder: hf upload YOUR_NAME/{name} {out} -->
# {name}

This model writes a *rationale* about a text before it embeds it: the embedding pools the hidden states of text and rationale
(`{pooling}`), at unit length. It was trained by reward with GRACE (Sun et al., ICLR 2026,
[arXiv 2510.04506](https://arxiv.org/abs/2510.04506)), starting from {base}.

{usage}

Each text costs up to {max_new_tokens} tokens of writing. As an ordinary causal language model the folder opens in transformers
and vLLM.

## Scores

On held-out rows. *Without* is the trained model on the prompt alone.

| | before training | after | without rationale |
| --- | ---: | ---: | ---: |
{scores}

## What it writes

{rationales}

## Settings

{settings}

The instruction:

{instruction}
"""

USAGE = """```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", trust_remote_code=True)  # the folder, or its id on the hub
vectors = model.encode_document(["a text", "another"])  # [2, D], unit length
found = model.encode_query(["what is searched for"]) @ vectors.T
written = model.encode_query(["a text"], output_value=None)[0]["rationale_ids"]
print(model.tokenizer.decode(written, skip_special_tokens=True))
```

`model.encode(texts, rationale=False)` embeds the prompt alone. The flag lets sentence-transformers run `grace_module.py`, the
one file in this folder that reads a text."""
OWN_USAGE = """```python
from grace import GraceEncoder  # of the code that trained it; other libraries do not read texts as this model does

model = GraceEncoder("{name}")
vectors, written = model.encode(["a text", "another"]), model.rationales(["a text"])
```"""


def write_card(out):
    """Write the card of a finished run into its folder, and, where the copy can read as the model does, the other two files."""
    write_atomically(os.path.join(out, "README.md"), build_card(out))
    if not sentence_transformer.unreadable(read_json(os.path.join(out, "summary.json"))["reading"]):
        copy = Path(sentence_transformer.__file__).read_text(encoding="utf-8")
        entry = {"idx": 0, "name": "0", "path": "", "type": f"{sentence_transformer.COPY}.GraceModule"}
        write_atomically(os.path.join(out, f"{sentence_transformer.COPY}.py"), copy)
        write_atomically(os.path.join(out, "modules.json"), json.dumps([entry], indent=2))


def build_card(out):
    """The model card of a finished run, as markdown. Only what has a hub id is named in full: paths are nobody's business."""
    summary, run = (read_json(os.path.join(out, name)) for name in ("summary.json", "run.json"))
    config, reading = summary["config"], summary["reading"]
    base, data = on_hub(config["model"]), on_hub(config["data"])
    opens, name = not sentence_transformer.unreadable(reading), os.path.basename(os.path.abspath(out))
    library = "sentence-transformers" if opens else "transformers"
    tags = f"{library}, sentence-similarity, feature-extraction, grace"
    metadata = [f"library_name: {library}", "pipeline_tag: sentence-similarity", f"tags: [{tags}]"]
    metadata += [f"base_model: {base}"] if base else []
    metadata += [f"datasets: [{data.partition(':')[0]}]"] if data else []
    moments = [summary[moment] for moment in ("before", "after", "after_without_rationale")]
    scores = [
        f"| `{name}` | " + " | ".join(f"{x[name]:.3f}" if name in x else "" for x in moments) + " |"
        for name in summary["after"]
    ]
    _, last = run["history"][-1]
    rationales = [f"{quoted(text)}\n>\n> *writes:* {quoted(rationale)[2:]}" for text, rationale in list(last.items())[:TEXTS]]
    mine = {**config, **reading}
    changed = [
        (field.name.replace("_", "-"), mine[field.name])
        for field in dataclasses.fields(Config)
        if field.name not in NOT_SHOWN and mine[field.name] != field.default
    ]
    settings = [f"`--no-{name}`" if x is False else f"`--{name}`" if x is True else f"`--{name} {x}`" for name, x in changed]
    return CARD.format(
        metadata="\n".join(metadata),
        name=name,
        out=out,
        usage=(USAGE if opens else OWN_USAGE).format(name=name),
        base=f"[{base}](https://huggingface.co/{base})" if base else f"`{os.path.basename(os.path.abspath(config['model']))}`",
        pooling=reading["pooling"],
        max_new_tokens=reading["max_new_tokens"],
        scores="\n".join(scores),
        rationales="\n\n---\n\n".join(rationales),
        instruction=quoted(reading["instruction"], None),
        settings=" ".join(settings),
    )


def on_hub(source):
    """A model or data set, if its name is a hub id, else None."""
    return source if re.fullmatch(r"[\w.-]+/[\w.:-]+", source) and not os.path.exists(source) else None


def quoted(text, limit=300):
    """A text as one quoted line of markdown, cut at the limit; its characters are shown and do nothing."""
    line = " ".join(text.split())
    line = line if limit is None or len(line) <= limit else line[:limit] + " …"
    return "> " + re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", line)
