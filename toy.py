"""The embedded default: a synthetic world, a tokenizer, and a tiny language model that can be taught.

    python toy.py --out runs/toy            # about a minute on two cores

writes `runs/toy/model` (an ordinary checkpoint folder) and `runs/toy/data` (ordinary jsonl files).
Nothing else in this repository knows that the toy exists.

World. An event has six slots, a slot one of eight concepts, a concept three synonyms: "the angry
physician purchased the lantern ..." and "... the furious doctor bought the lamp" are the same
event. A query and its positive tell one event in different sentence forms and mostly different
words; the hard negative changes one slot and copies all its other words, so whoever compares words
prefers it.

Model. A Llama-architecture network of about 0.35 M parameters, warmed up as a language model on
chats in which the answer names the event's slots, one word each, in a fixed order. First the
answers are complete; then they are noisy: a slot named with probability 0.5, wrong with 0.2, any
synonym at random, and 15 % empty talk. So the policy that GRACE starts from writes poor and varied
rationales, and has learned enough to do better.
"""

import argparse
import json
import os
import random
import time

import torch
import torch.nn.functional as F

TEMPLATE = (  # ChatML in small: one special token opens each message
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = ("<pad>", "<unk>", "<system>", "<user>", "<assistant>", "<end>")


# ---------------------------------------------------------------- the worlds


class World:
    """Slots, the words for their concepts, and the sentence forms they are told in.

    slots    {slot: concepts}, a concept its synonyms, as in "old elderly|young youthful"
    forms    sentences with every slot in them
    phrases  {slot: how a rationale names it}, in the rationale's order
    talk     what an answer says that names nothing
    """

    def __init__(self, instruction, slots, forms, phrases, talk):
        self.instruction, self.forms, self.phrases, self.talk = instruction, forms, phrases, talk
        self.slots = {slot: [c.split() for c in concepts.split("|")] for slot, concepts in slots.items()}
        self.concept = {w: (s, i) for s, concepts in self.slots.items() for i, words in enumerate(concepts) for w in words}

    def event(self, rng):
        """A concept for every slot, by number."""
        return {slot: rng.randrange(len(concepts)) for slot, concepts in self.slots.items()}

    def changed(self, event, slot, rng):
        """The event with another concept in one slot."""
        return {**event, slot: rng.choice([c for c in range(len(self.slots[slot])) if c != event[slot]])}

    def tell(self, event, rng, form=None, avoid=()):
        """An event as a sentence. Words in `avoid` are passed over with probability 0.7. `-> (text, words)`."""
        words = {}
        for slot, concept in event.items():
            fresh = [w for w in self.slots[slot][concept] if w not in avoid]
            words[slot] = rng.choice(fresh if rng.random() < 0.7 else self.slots[slot][concept])
        return (form or rng.choice(self.forms)).format(**words), words

    def triplet(self, event, rng):
        """A query, its positive, and a negative that copies the query's words but for one slot."""
        form, other = rng.sample(self.forms, 2)
        query, words = self.tell(event, rng, form)
        positive, _ = self.tell(event, rng, other, avoid=set(words.values()))
        slot = rng.choice(list(self.slots))
        wrong = rng.choice(self.slots[slot][self.changed(event, slot, rng)[slot]])
        negative = rng.choice([f for f in self.forms if f != form]).format(**{**words, slot: wrong})
        return {"query": query, "positive": positive, "negative": negative}

    def graded_pair(self, event, rng):
        """Two sentences that agree in none, some or all of the slots; the score is how many."""
        S = len(self.slots)
        differ, other = rng.sample(list(self.slots), rng.randint(0, S)), dict(event)
        for slot in differ:
            other = self.changed(other, slot, rng)
        one, two = self.tell(event, rng), self.tell(other, rng)
        return {"sentence1": one[0], "sentence2": two[0], "score": float(S - len(differ))}

    def rationale(self, event, rng, keep=1.0, wrong=0.0):
        """The slots of an event, one phrase each, in order; a slot may be left out or wrong."""
        said = []
        for slot, phrase in self.phrases.items():
            luck = rng.random()
            if luck < keep:
                said.append(phrase.format(rng.choice(self.slots[slot][event[slot]])))
            elif luck < keep + wrong:
                said.append(phrase.format(rng.choice(self.slots[slot][self.changed(event, slot, rng)[slot]])))
        return " ".join(said)

    def named(self, written, text):
        """How much of a text its rationale names: `(recall over the slots, precision of what is named)`."""
        told = {self.concept[w] for w in text.split() if w in self.concept}
        claims = {self.concept[w] for w in written.split() if w in self.concept}
        return len(told & claims) / len(told), len(told & claims) / max(len(claims), 1)

    def well_formed(self, written):
        """Whether a rationale is what the warm start was taught to write: phrases in order, each slot at most once."""
        named = [w for w in written.split() if w in self.concept]
        slots = [self.concept[w][0] for w in named]
        in_order = [slot for slot in self.phrases if slot in slots]
        return slots == in_order != [] and written == " ".join(self.phrases[s].format(w) for s, w in zip(slots, named))


INSTRUCTION = "name what happened"
EVENTS = World(
    INSTRUCTION,
    {  # six slots of eight concepts of three synonyms
        "attribute": "old elderly aged|young youthful juvenile|tall lanky towering|rich wealthy affluent|"
        "happy cheerful merry|angry furious irate|quiet silent hushed|clever smart bright",
        "agent": "doctor physician medic|child kid youngster|thief robber burglar|teacher instructor tutor|"
        "soldier trooper warrior|farmer grower rancher|sailor seaman mariner|singer vocalist crooner",
        "act": "bought purchased acquired|sold traded vended|wrecked smashed shattered|mended repaired fixed|"
        "buried concealed stashed|found discovered located|painted coloured decorated|carried hauled lugged",
        "object": "car automobile vehicle|boat ship vessel|coat jacket parka|lamp lantern torch|"
        "knife blade dagger|bicycle bike cycle|sofa couch settee|picture portrait canvas",
        "place": "forest woods woodland|street road avenue|shop store boutique|church chapel cathedral|"
        "beach shore coast|prison jail dungeon|school academy college|inn hotel hostel",
        "time": "morning daybreak sunrise|noon midday lunchtime|afternoon teatime siesta|evening dusk sunset|"
        "night midnight nighttime|winter wintertime snowtime|summer summertime midsummer|autumn fall harvest",
    },
    (
        "the {attribute} {agent} {act} the {object} near the {place} around {time} .",
        "around {time} , near the {place} , the {attribute} {agent} {act} the {object} .",
        "it was near the {place} that the {attribute} {agent} {act} the {object} around {time} .",
        "around {time} the {object} was {act} by the {attribute} {agent} near the {place} .",
        "somebody {act} the {object} near the {place} around {time} : the {attribute} {agent} .",
        "near the {place} the {agent} , who was {attribute} , {act} the {object} around {time} .",
    ),
    {slot: "{}" for slot in ("attribute", "agent", "act", "object", "place", "time")},
    ("something happened somewhere", "it was the usual", "somebody was there"),
)
MEALS = World(  # another build: seven slots, six concepts, two synonyms, and rationales with small words
    "say who had what",
    {
        "weather": "rain drizzle|snow sleet|fog mist|storm gale|heat swelter|frost ice",
        "mood": "calm serene|nervous anxious|proud haughty|tired weary|curious inquisitive|grumpy sullen",
        "guest": "nurse caregiver|lawyer attorney|painter artist|pilot aviator|monk friar|clown jester",
        "deed": "ordered requested|tasted sampled|spilled dropped|praised lauded|cooked prepared|refused declined",
        "dish": "soup broth|cake tart|bread loaf|fish trout|stew casserole|salad greens",
        "drink": "coffee espresso|tea infusion|wine claret|beer ale|juice nectar|milk cream",
        "venue": "kitchen galley|garden orchard|tavern pub|train railcar|balcony terrace|cellar basement",
    },
    (
        "in the {venue} , despite {weather} , a {mood} {guest} {deed} some {dish} with {drink} .",
        "{dish} and {drink} were {deed} by one {guest} , rather {mood} , in our {venue} during {weather} .",
        "they say a {guest} {deed} {dish} , {drink} beside it , while {weather} ruled outside the {venue} ; how {mood} !",
        "{weather} again : {mood} as ever , the {guest} of the {venue} {deed} her {drink} and her {dish} .",
        "was it {dish} or {drink} that the {guest} {deed} , {mood} about the {weather} , back at the {venue} ?",
    ),
    {
        "guest": "{}",
        "deed": "who {}",
        "dish": "some {}",
        "drink": "with {}",
        "venue": "at the {}",
        "weather": "in {}",
        "mood": "and felt {}",
    },
    ("nothing worth noting", "people were busy", "such is life"),
)
PARCELS = World(  # a third, on which nothing was ever chosen: five slots of nine concepts, what went where and how it fared
    "report the parcel",
    {
        "cargo": "letter message|crate chest|violin fiddle|carpet rug|clock timepiece|mirror glass|stove oven|"
        "basket hamper|ladder steps",
        "mishap": "lost mislaid|soaked drenched|burnt scorched|stolen pinched|delayed postponed|crushed squashed|"
        "opened unsealed|swapped switched|dented bent",
        "carrier": "postman courier|trucker driver|cyclist rider|skipper captain|porter bearer|drone robot|"
        "trader merchant|scout ranger|clerk officer",
        "origin": "harbour port|mine quarry|palace mansion|village hamlet|mountain summit|island isle|desert dunes|"
        "swamp marsh|valley glen",
        "target": "hospital clinic|library archive|museum gallery|stadium arena|factory plant|airport airfield|"
        "embassy consulate|theatre playhouse|bakery patisserie",
    },
    (
        "from the {origin} to the {target} a {carrier} brought one {cargo} , which got {mishap} on the way .",
        "the {cargo} got {mishap} , says the {carrier} , somewhere past the {origin} and before the {target} .",
        "no {cargo} reached the {target} intact : {mishap} after the {origin} , while our {carrier} slept .",
        "one more {cargo} {mishap} ! the {carrier} left the {origin} early and found the {target} shut .",
        "which {carrier} had the {cargo} for the {target} ? it came from the {origin} and was {mishap} .",
    ),
    {"cargo": "the {}", "mishap": "was {}", "carrier": "by {}", "origin": "out of {}", "target": "bound for {}"},
    ("things went astray", "another day at work", "who can tell"),
)
WORLDS = {"events": EVENTS, "meals": MEALS, "parcels": PARCELS}


# ---------------------------------------------------------------- tokenizer, network, warm start


def build_tokenizer(world=EVENTS):
    """A word-level tokenizer over a world's words, with a chat template and an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = " ".join((*world.forms, *world.phrases.values(), *world.talk, world.instruction)).split()
    words = dict.fromkeys([*SPECIAL, *sorted({w for w in plain if "{" not in w} | set(world.concept))])
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(tokenizer, seed):
    """A random Llama-architecture network. The initial scale D**-0.5 is what lets it learn to copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    D = 96
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=D,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=256,
            initializer_range=D**-0.5,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def warm_up(model, tokenizer, world, draw_event, rng, steps=800, B=96, lr=3e-3):
    """Language modelling on chats: complete rationales for the first half of the steps, then noisy ones."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    for step in range(steps):
        chats = []
        for _ in range(B):
            event = draw_event()
            if step < steps // 2:
                answer = world.rationale(event, rng)
            elif rng.random() < 0.15:
                answer = rng.choice(world.talk)
            else:
                answer = world.rationale(event, rng, keep=0.5, wrong=0.2)
            chats.append(f"<system> {world.instruction} <user> {world.tell(event, rng)[0]} <assistant> {answer} <end>")
        batch = tokenizer(chats, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"warm-up step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model


def write_rows(path, rows):
    """Rows as jsonl."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_tasks(folder, heldout, graded):
    """The held-out sets as two evaluation tasks in the hub's layout: retrieval, and graded pairs."""
    documents = dict.fromkeys([row["positive"] for row in heldout] + [row["negative"] for row in heldout])
    number = {text: f"d{i}" for i, text in enumerate(documents)}
    asked = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(row["query"] for row in heldout))}
    judged = {(asked[row["query"]], number[row["positive"]]) for row in heldout}
    parts = {
        "corpus": [{"_id": i, "title": "", "text": text} for text, i in number.items()],
        "queries": [{"_id": i, "text": text} for text, i in asked.items()],
        "qrels": [{"query-id": q, "corpus-id": d, "score": 1} for q, d in sorted(judged)],
    }
    for part, rows in parts.items():
        write_rows(os.path.join(folder, "ToyRetrieval", part, "test.jsonl"), rows)
    write_rows(os.path.join(folder, "ToyPairs", "test.jsonl"), graded)


def build(out, seed=0, train=4096, heldout=256, steps=800, world=EVENTS):
    """Write the world's data and the warmed-up model under `out`. The same seed gives the same files."""
    rng = random.Random(seed)
    # One event in eight is held out, by its slots alone, so train and held-out never share one.
    reserved = lambda event: sum(c * 3**i for i, c in enumerate(event.values())) % 8 == 0  # noqa: E731

    def draw_event(held=False):
        while True:  # one draw in eight is held out: a miss a hundred times over is a bug, not bad luck
            event = world.event(rng)
            if reserved(event) == held:
                return event

    files = {
        "train": [world.triplet(draw_event(), rng) for _ in range(train)],
        "texts": [{"text": world.tell(draw_event(), rng)[0]} for _ in range(train)],
        "heldout": [world.triplet(draw_event(True), rng) for _ in range(heldout)],
        "graded": [world.graded_pair(draw_event(True), rng) for _ in range(2 * heldout)],
    }
    for name, rows in files.items():
        write_rows(os.path.join(out, "data", f"{name}.jsonl"), rows)
    write_tasks(os.path.join(out, "tasks"), files["heldout"], files["graded"])
    tokenizer = build_tokenizer(world)
    model = warm_up(build_model(tokenizer, seed), tokenizer, world, draw_event, rng, steps)
    folder = os.path.join(out, "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with open(os.path.join(folder, "grace_config.json"), "w") as file:
        json.dump({"instruction": world.instruction, "max_prompt_tokens": 64, "max_new_tokens": 20}, file, indent=2)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toy", help="folder to write model/ and data/ into")
    parser.add_argument("--seed", type=int, default=0, help="of the world's data and of the warm start")
    parser.add_argument("--steps", type=int, default=800, help="warm-up steps (fewer: a worse start, for tests)")
    parser.add_argument("--world", default="events", choices=tuple(WORLDS), help="what the texts are about")
    args = parser.parse_args()
    start = time.time()
    print(f"wrote {build(args.out, args.seed, steps=args.steps, world=WORLDS[args.world])} in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
