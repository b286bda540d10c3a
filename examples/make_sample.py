"""Write a small SQuAD v1.1 data set about invented towns, ships, composers, railways, ...

The set is large enough to fine-tune a small BERT in a few minutes. It is hard enough that the only
year or the only name of a paragraph is not the answer: every article also tells facts of the same
kind about other entities. Train and dev are about different entities, with names from separate
pools, and a few wordings occur in dev only.

    python examples/make_sample.py --output_dir examples/data

All sentences come from the templates in sample_domains.txt. The kinds of values in its facts are

    year:lo:hi        a year, lo to hi years after the entity's base year
    date:lo:hi        a full date in such a year ("?slot.year" asks for the year alone)
    num:lo:hi:step:u  a quantity with its unit u
    number:lo:hi      a bare number
    pick:a|b|c        one of the phrases
    person, title, town, river, country, nation, city   a name of that kind
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

DOMAINS_FILE = Path(__file__).with_name("sample_domains.txt")
LONG_EVERY = 18  # one paragraph in 18 is longer than the model's 384-token window
SHORT_WORDS = (45, 105)
LONG_WORDS = (340, 480)

# ---------------------------------------------------------------------------------------------
# names: the words of these pools are divided between train and dev, so the two share no name


def words(text: str) -> list[str]:
    """A pool of names, written as plain text."""
    return text.split()


STEMS = words("""
    Vel Brann Oster Kal Thorn Mar Lind Gris Hal Sund Tarn Wester Eld Rosk Fenn Dor Ulm Kest Sel
    Berg Norr Alm Hav Trel Bor Quel Strand Mor Garn Pell Ash Corv Döll Fjor Lür Sør Näs Ryd Vann
    Wil Zell Arn Birk Dun Erl Falk Gold Hern Ister Jar Krag Lom Mist Nith Orm Pren Rav Skarn
    Tolv Und Varg Wend Yar Zand Ålm Brack Clev Drev Esk Frod Glim Holm Ing Jost Kvern Lark Meld
    Nord
""")
SURNAMES = words("""
    Velt Aldersey Brandt Castellan Dörfler Eriksen Fontaine Grünwald Halloran Ibsley Jansson
    Kowalczyk Lindholm Moreau Nørgaard Oliveira Petrov Quillon Rasmussen Sørensen Tavares
    Ullmann Vasquez Whitlock Yilmaz Zeller Ashcombe Bellweather Corvino Delacroix Engström
    Fairfax Gautier Hollander Ishikawa Jürgens Kettleby Lefèvre Marchetti Novák Ottesen
    Pemberton Renard Saarinen Thackery Underhill Vogel Wexford Zimmermann Amsel Bianchi
    Crowhurst Dvořáček Elsworth Falkner Giordano Haverkamp Jelinek Kallio Lombardi Müller
    Naismith Østergaard Pellegrin Rousselot Stahlberg Tremayne Vanderhoek Winterbourne Zanetti
    Arbuthnot Boisvert Calloway Drachmann Escobedo Fitzwarren Gallagher Hjelm Kaczmarek
    Lundqvist Mortensen Oakeshott Pasquier Rademaker Steenbergen Thorvald Verhoeven Wadsworth
""")
ADJECTIVES = words("""
    Silent Golden Broken Crimson Distant Patient Hollow Frozen Paper Copper Restless Quiet
    Wandering Amber Burning Crooked Endless Faded Gentle Hidden Iron Lonely Midnight Northern
    Painted Salt Scarlet Sleeping Velvet Winter
""")
THINGS = words("""
    Lantern Orchard Harbour Kestrel Mirror Compass Sparrow Bridge Violin Anchor Meadow Clock
    Heron Garden Staircase Falcon River Window Candle Island Swallow Letter Tower Comet Curlew
    Voyager Beacon Thistle Pilgrim Nightingale
""")
SHADES = words("""
    pale dusky banded silver long-eared red-bellied masked bearded spotted white-footed
""")
BEASTS = words("""
    marten shrew vole hare squirrel dormouse mole weasel hedgehog badger otter jerboa
""")

# these words only fill in facts, so both files may use all of them
WOMEN = words("""
    Élodie Anna Clara Ingrid Marta Helena Beatriz Zoë Agnes Lucía Johanna Edith Sofia Renée
    Mathilde Greta Isabel Astrid Theodora Rosalind Irena Camille Frances Noémie Judith Ottilie
""")
MEN = words("""
    Søren Karl Henri Matteo Tobias Anders Jan Björn Emil Rafael Oskar Viktor Thomas André Nils
    Edmund Leopold Casimir Hugo Gregor Ambrose José Felix Laurent Walter Ivo Jürgen
""")
PLACES = {  # country: (adjective, cities)
    "Austria": ("Austrian", ("Vienna", "Graz", "Salzburg")),
    "Belgium": ("Belgian", ("Antwerp", "Ghent", "Liège")),
    "Denmark": ("Danish", ("Copenhagen", "Aarhus", "Odense")),
    "Finland": ("Finnish", ("Helsinki", "Turku", "Tampere")),
    "France": ("French", ("Lyon", "Marseille", "Bordeaux")),
    "Germany": ("German", ("Leipzig", "Hamburg", "Göttingen")),
    "Hungary": ("Hungarian", ("Budapest", "Szeged")),
    "Ireland": ("Irish", ("Dublin", "Cork", "Galway")),
    "Italy": ("Italian", ("Genoa", "Bologna", "Trieste")),
    "Norway": ("Norwegian", ("Bergen", "Oslo", "Tromsø")),
    "Poland": ("Polish", ("Kraków", "Gdańsk", "Poznań")),
    "Portugal": ("Portuguese", ("Lisbon", "Porto", "Coimbra")),
    "Scotland": ("Scottish", ("Edinburgh", "Glasgow", "Dundee")),
    "Spain": ("Spanish", ("Seville", "Valencia", "Málaga")),
    "Sweden": ("Swedish", ("Uppsala", "Malmö", "Gothenburg")),
    "Switzerland": ("Swiss", ("Geneva", "Basel", "Zürich")),
}
MONTHS = words("""
    January February March April May June July August September October November December
""")
SMALL = words("""
    zero one two three four five six seven eight nine ten eleven twelve
""")
TOWN_ENDINGS = ("stad", "wick", "bury", "haven", "ham", "dorf", "by")
CONNECTIVES = ("As far as is known, ", "By all accounts, ", "According to most sources, ")


def deal(pool: list[str], split: str) -> list[str]:
    """The words of a pool that belong to one split: every third one is kept for dev."""
    return [w for i, w in enumerate(pool) if (i % 3 == 2) == (split == "dev")]


# ---------------------------------------------------------------------------------------------
# the templates


@dataclass
class Fact:
    """One kind of fact: its values, the sentences that tell it, the questions about it."""

    slots: dict[str, str]
    say: list[tuple[str, bool]] = field(default_factory=list)  # (template, dev only)
    aside: list[str] = field(default_factory=list)
    echo: list[str] = field(default_factory=list)
    ask: list[tuple[str, str, bool]] = field(default_factory=list)  # (slot, template, dev only)


@dataclass
class Domain:
    """One kind of entity with everything that can be told about it."""

    name: str
    noun: str
    base: tuple[int, int]
    names: list[str] = field(default_factory=list)
    other: str = "{O}"  # how the first other entity of a paragraph is introduced
    facts: list[Fact] = field(default_factory=list)


def load_domains(path: Path = DOMAINS_FILE) -> list[Domain]:
    """Read the template file; its header explains the line types."""
    domains: list[Domain] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        mark, _, text = line.partition(" ")
        if not line or mark == "#":
            continue
        if match := re.fullmatch(r"\[(\w+)\] noun=(\w+) base=(\d+)-(\d+)", line):
            name, noun, low, high = match.groups()
            domains.append(Domain(name, noun, (int(low), int(high))))
            continue
        domain, dev_only = domains[-1], mark.endswith("*")
        mark = mark.rstrip("*")
        if mark == "names:":
            domain.names = [pattern.strip() for pattern in text.split("|")]
        elif mark == "other:":
            domain.other = text
        elif mark == "fact":
            slots = (item.split("=", 1) for item in text.split("; "))
            domain.facts.append(Fact({slot.strip(): kind for slot, kind in slots}))
        elif mark == "+":
            domain.facts[-1].say.append((text, dev_only))
        elif mark == "~":
            domain.facts[-1].aside.append(text)
        elif mark == "=":
            domain.facts[-1].echo.append(text)
        elif mark.startswith("?"):
            domain.facts[-1].ask.append((mark[1:], text, dev_only))
        else:
            raise ValueError(f"cannot read this line of {path}: {line!r}")
    return domains


# ---------------------------------------------------------------------------------------------
# values and entities


@dataclass
class Value:
    """The content of a slot: its text, a shorter answer within it, a number for comparisons."""

    text: str
    short: str = ""  # the surname, the year of a date, the number without its unit
    number: int = 0
    kind: str = ""


@dataclass
class Entity:
    """The subject of a section: its name and one value for every slot of its domain."""

    domain: Domain
    name: str
    woman: bool
    values: list[dict[str, Value]]  # one dict per fact

    @property
    def is_person(self) -> bool:
        """People are called by surname and he or she, everything else by its noun and "it"."""
        return self.domain.noun == "person"

    @property
    def later_name(self) -> str:
        """The name used after the first mention."""
        return self.name.split(" ", 1)[1] if self.is_person else self.name

    def pronoun(self, case: str) -> str:
        """The pronoun for a {S}, {P} or {him} that follows an earlier mention."""
        if not self.is_person:
            return {"S": "it", "P": "its", "him": "it"}[case]
        if self.woman:
            return {"S": "she", "P": "her", "him": "her"}[case]
        return {"S": "he", "P": "his", "him": "him"}[case]


class Namer:
    """Draws names and values for one split, without repetition inside a paragraph."""

    def __init__(self, rng: random.Random, split: str):
        self.rng = rng
        self.used: set[str] = set()  # words taken in the current paragraph
        self.pools = {
            "stem": deal(STEMS, split),
            "surname": deal(SURNAMES, split),
            "adj": deal(ADJECTIVES, split),
            "thing": deal(THINGS, split),
            "shade": SHADES,
            "beast": deal(BEASTS, split),
            "digit": [str(d) for d in range(2, 10)],
        }

    def fresh(self, draw: Callable[[], str]) -> str:
        """Draw until the result is new to the paragraph (or the pool seems exhausted)."""
        for _ in range(40):
            text = draw()
            if text not in self.used:
                break
        self.used.add(text)
        return text

    def word(self, pool: str) -> str:
        """A new word of a pool."""
        return self.fresh(lambda: self.rng.choice(self.pools[pool]))

    def fill(self, pattern: str) -> str:
        """Fill the pools' words into a name pattern."""
        return re.sub(r"\{(\w+)\}", lambda m: self.word(m[1]), pattern)

    def person(self, woman: bool) -> str:
        """A full name."""
        first = self.fresh(lambda: self.rng.choice(WOMEN if woman else MEN))
        return f"{first} {self.word('surname')}"

    def title(self) -> str:
        """The title of a book, painting or opera."""
        return f"The {self.word('adj')} {self.word('thing')}"

    def name(self, domain: Domain, woman: bool) -> str:
        """A name for an entity of the domain."""
        pattern = self.rng.choice(domain.names)
        if pattern == "{person}":
            return self.person(woman)
        if pattern == "{title}":
            return self.title()
        return self.fill(pattern.replace("{woman}", self.person(True)))

    def value(self, spec: str, base: int) -> Value:
        """Draw a value for a slot; the module's docstring lists the kinds."""
        rng = self.rng
        kind, *args = spec.split(":")
        if kind in ("year", "date"):
            low, high = base + int(args[0]), base + int(args[1])
            year = str(low) if low == high else self.fresh(lambda: str(rng.randint(low, high)))
            self.used.add(year)
            if kind == "year":
                return Value(year, number=int(year), kind=kind)
            date = f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {year}"
            return Value(date, short=year, number=int(year), kind=kind)
        if kind in ("num", "number"):
            low, high, step = int(args[0]), int(args[1]), int(args[2]) if args[2:] else 1
            digits = self.fresh(lambda: str(rng.randrange(low, high + 1, step)))
            number = int(digits)
            short = SMALL[number] if number <= 12 else f"{number:,}"
            if kind == "number":
                return Value(short, number=number, kind=kind)
            return Value(f"{short} {args[3]}", short=short, number=number, kind=kind)
        if kind == "pick":
            return Value(self.fresh(lambda: rng.choice(args[0].split("|"))), kind=kind)
        if kind == "person":
            name = self.person(rng.random() < 0.5)
            return Value(name, short=name.split(" ", 1)[1], kind=kind)
        if kind == "country":
            return Value(self.fresh(lambda: rng.choice(list(PLACES))), kind=kind)
        if kind == "nation":
            return Value(self.fresh(lambda: rng.choice(list(PLACES.values()))[0]), kind=kind)
        if kind == "city":
            city = self.fresh(lambda: rng.choice(rng.choice(list(PLACES.values()))[1]))
            return Value(city, kind=kind)
        if kind == "town":
            return Value(self.word("stem") + rng.choice(TOWN_ENDINGS), kind=kind)
        if kind == "river":
            return Value(f"River {self.word('stem')}", kind=kind)
        if kind == "title":
            return Value(self.title(), kind=kind)
        raise ValueError(f"unknown kind of value: {spec}")

    def entity(self, domain: Domain, base: int) -> Entity:
        """An entity with a value for every slot; its base year is fixed by the caller."""
        woman = self.rng.random() < 0.5
        self.used.add(str(base))
        name = self.name(domain, woman)
        values = [
            {slot: self.value(kind, base) for slot, kind in fact.slots.items()}
            for fact in domain.facts
        ]
        return Entity(domain, name, woman, values)


# ---------------------------------------------------------------------------------------------
# text


@dataclass
class Span:
    """A value told in the text, and therefore a possible answer."""

    entity: Entity
    fact: int
    slot: str
    value: Value
    start: int
    end: int


@dataclass
class Text:
    """A piece of text with the values that it tells."""

    text: str = ""
    spans: list[Span] = field(default_factory=list)

    def append(self, other: "Text", separator: str) -> None:
        """Add another piece at the end and shift its spans."""
        separator = separator if self.text else ""
        shift = len(self.text) + len(separator)
        self.text += separator + other.text
        for s in other.spans:
            span = Span(s.entity, s.fact, s.slot, s.value, s.start + shift, s.end + shift)
            self.spans.append(span)


def possessive(name: str) -> str:
    """The genitive of a name."""
    return name + ("'" if name.endswith("s") else "'s")


def capitalise(text: str) -> str:
    """Upper-case the first letter only."""
    return text[0].upper() + text[1:]


def render(
    template: str, teller: Entity, main: Entity, fact: int, subject: str, other: str = ""
) -> Text:
    """Fill a template with the teller's values; `subject` is what {S} becomes the first time.

    The teller is the main entity itself, or the one called `other` if the template is an aside.
    An empty subject stands for the pronoun.
    """
    out, spans, position = "", [], 0
    for match in re.finditer(r"\{([^}]+)\}", template):
        out += template[position : match.start()]
        position = match.end()
        key = match[1]
        if key in ("S", "P"):
            first = subject if key == "S" else possessive(subject)
            out += first if subject != "" else main.pronoun(key)
            subject = ""
        elif key in ("p", "him"):
            out += main.pronoun("P" if key == "p" else key)
        elif key == "N":
            out += main.later_name if fact else main.name
            subject = ""
        elif key == "O":
            out += other
        elif "?" in key:
            slot, words = key.split("?")
            smaller, larger = words.split(":")
            less = teller.values[fact][slot].number < main.values[fact][slot].number
            out += smaller if less else larger
        else:
            value = teller.values[fact][key]
            # "8" and "18" are the only numbers here that sound like a vowel
            if re.search(r"\b[Aa] $", out) and re.match(r"[AEIOUaeiouÉØÅ]|8|18\b", value.text):
                out = out[:-1] + "n "
            spans.append(Span(teller, fact, key, value, len(out), len(out) + len(value.text)))
            out += value.text
    return Text(capitalise(out + template[position:]), spans)


def names_subject(template: str) -> bool:
    """Whether the sentence can stand after one about something else."""
    return any(key in template for key in ("{S}", "{P}", "{N}"))


def write_section(
    rng: random.Random,
    main: Entity,
    others: list[Entity],
    facts: int,
    asides: int,
    dev: bool,
    told: set[str],
) -> Text:
    """A paragraph about `main` that tells some of its facts, and a few facts of `others`.

    `told` collects the templates of the whole text: none is used twice if another one is left.
    """
    domain = main.domain
    chosen = rng.sample(range(1, len(domain.facts)), min(facts, len(domain.facts) - 1))
    # roughly in the order of the file, which is roughly chronological
    chosen.sort(key=lambda i: i + rng.uniform(0, 3.5))
    chosen.insert(0, 0)
    with_aside = set(rng.sample(chosen, asides))

    section, met = Text(), set()
    with_echo = rng.random() < 0.5
    away = False  # the last sentence was about something else: name the subject again
    streak = 0  # pronouns in a row
    for i in chosen:
        fact = domain.facts[i]
        # an echo repeats a value where it answers nothing (no spans), before or after the fact
        echo = None
        if i and with_echo and fact.echo and fact.echo[0] not in told:
            told.add(fact.echo[0])
            echo = Text(render(fact.echo[0], main, main, i, "").text)
        early = echo is not None and rng.random() < 0.5
        if early:
            section.append(echo, " ")
            away = True
        templates = [text for text, dev_only in fact.say if dev or not dev_only]
        templates = [t for t in templates if names_subject(t) or not away]
        template = rng.choice([t for t in templates if t not in told] or templates)
        told.add(template)
        roll = rng.random()
        if away or roll < 0.2 or streak > 1:
            subject = main.later_name
        elif main.is_person or roll < 0.65:
            subject = main.pronoun("S")
        else:
            subject = f"the {domain.noun}"
        is_pronoun = subject == main.pronoun("S")
        sentence = render(template, main, main, i, "" if is_pronoun else subject)
        last = section.text.rsplit(". ", 1)[-1]
        plain = len(last.split()) < 12 and not re.search(r"[,;]|because|since|when", last)
        if is_pronoun and template.startswith("{S} ") and plain and i and rng.random() < 0.5:
            section.text = section.text.removesuffix(".")
            sentence.text = sentence.text[0].lower() + sentence.text[1:]
            section.append(sentence, ", and ")
        else:
            if template.startswith(("{S} ", "{P} ")) and i and rng.random() < 0.06:
                opening = Text(rng.choice(CONNECTIVES).rstrip(", "))
                if is_pronoun or subject.startswith("the "):
                    sentence.text = sentence.text[0].lower() + sentence.text[1:]
                opening.append(sentence, ", ")
                sentence = opening
            section.append(sentence, " ")
        streak = streak + 1 if is_pronoun and "{S}" in template else 0
        # "he" after another person's name would be unclear
        away = main.is_person and any(s.value.kind == "person" for s in sentence.spans)
        if i in with_aside and others:
            other = rng.choice(others)
            subject = main.later_name if away else ""
            aside = rng.choice(fact.aside)
            called = other.later_name if other.name in met else other.name
            if not met and aside.startswith("{O}"):
                possessor = possessive(subject) if subject else main.pronoun("P")
                called = domain.other.replace("{P}", possessor).replace("{O}", other.name)
            met.add(other.name)
            section.append(render(aside, other, main, i, subject, called), " ")
            away = True
        if echo and not early:
            section.append(echo, " ")
            away = True
    return section


def write_context(rng: random.Random, namer: Namer, domain: Domain, long: bool) -> Text:
    """The text of one article; a long one has several sections about related entities."""
    dev = namer.pools["stem"] == deal(STEMS, "dev")
    low, high = LONG_WORDS if long else SHORT_WORDS
    while True:
        namer.used.clear()
        told: set[str] = set()
        # entities of one age, all within the range in which their facts are plausible
        first, last = domain.base
        start = rng.randint(first, last - 30)
        entities = [namer.entity(domain, base) for base in rng.sample(range(start, start + 30), 6)]
        if long:
            context = Text()
            for entity in entities[: rng.randint(4, 6)]:
                section = write_section(rng, entity, [], rng.randint(5, 7), 0, dev, told)
                context.append(section, "\n")
        else:
            others = entities[1 : rng.randint(2, 3)]
            facts, asides = rng.randint(4, 6), rng.randint(2, 3)
            context = write_section(rng, entities[0], others, facts, asides, dev, told)
        if low <= len(context.text.split()) <= high:
            return context


# ---------------------------------------------------------------------------------------------
# questions


def ask(rng: random.Random, context: Text, span: Span, dev: bool) -> dict | None:
    """A question about a span, with its answers (the dev file accepts a second, shorter one)."""
    wordings = [
        (slot, template)
        for slot, template, dev_only in span.entity.domain.facts[span.fact].ask
        if slot.split(".")[0] == span.slot and (dev or not dev_only)
    ]
    if not wordings:
        return None
    slot, template = rng.choice(wordings)
    name = span.entity.name if rng.random() < 0.7 else span.entity.later_name
    question = capitalise(template.replace("{N}", name))

    full = context.text[span.start : span.end]
    texts = [full]
    if slot.endswith(".year"):
        texts = [span.value.short]
    elif dev and span.value.short and (span.value.kind != "date" or "hen " in template):
        texts.append(span.value.short)
    answers = []
    for text in texts:
        start = span.start + full.index(text)
        assert context.text[start : start + len(text)] == text
        answers.append({"text": text, "answer_start": start})
    return {"id": "", "question": question, "answers": answers}


def ask_all(rng: random.Random, context: Text, long: bool, dev: bool) -> list[dict]:
    """Five to eight questions, spread over the whole text, each about another value."""
    want = 8 if long else rng.randint(5, 8)
    spans = sorted(context.spans, key=lambda s: s.start)
    # deal the thirds of the text in turn, so that beginning, middle and end are all asked about
    cut = -(-len(spans) // 3)
    thirds = [rng.sample(part, len(part)) for part in (spans[:cut], spans[cut : 2 * cut])]
    thirds.append(rng.sample(spans[2 * cut :], len(spans[2 * cut :])))
    questions: dict[str, dict] = {}
    while len(questions) < want and any(thirds):
        for part in thirds:
            if part and len(questions) < want and (qa := ask(rng, context, part.pop(), dev)):
                questions.setdefault(qa["question"], qa)
    return list(questions.values())


# ---------------------------------------------------------------------------------------------
# files


def make_split(split: str, seed: int, minimum: int) -> dict:
    """The data set of one split, with at least `minimum` questions."""
    rng = random.Random(f"{seed}-{split}")
    namer = Namer(rng, split)
    domains = load_domains()
    articles: dict[str, dict] = {}
    order: list[Domain] = []
    count = 0
    while count < minimum:
        if not order:
            order = rng.sample(domains, len(domains))
        domain = order.pop()
        long = len(articles) % LONG_EVERY == LONG_EVERY // 2
        context = write_context(rng, namer, domain, long)
        title = capitalise(context.spans[0].entity.name)
        if title in articles:
            continue
        qas = ask_all(rng, context, long, split == "dev")
        for qa in qas:
            key = f"{split}/{title}/{qa['question']}"
            qa["id"] = hashlib.sha1(key.encode()).hexdigest()[:24]
        articles[title] = {"title": title, "paragraphs": [{"context": context.text, "qas": qas}]}
        count += len(qas)
    return {"version": "1.1", "data": list(articles.values())}


def summarise(path: Path, data: dict) -> str:
    """One line about a written file."""
    paragraphs = [p for article in data["data"] for p in article["paragraphs"]]
    questions = sum(len(p["qas"]) for p in paragraphs)
    longest = max(len(p["context"].split()) for p in paragraphs)
    return (
        f"{path}: {questions} questions, {len(paragraphs)} paragraphs, "
        f"longest context {longest} words"
    )


def main(argv: list[str] | None = None) -> None:
    """Write train-v1.1.json and dev-v1.1.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("examples/data"))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--num_train", type=int, default=1800, help="minimum train questions")
    parser.add_argument("--num_dev", type=int, default=240, help="minimum dev questions")
    args = parser.parse_args(argv)

    splits = {
        "train": make_split("train", args.seed, args.num_train),
        "dev": make_split("dev", args.seed, args.num_dev),
    }
    titles = [{article["title"] for article in data["data"]} for data in splits.values()]
    assert not titles[0] & titles[1], "train and dev share an entity"

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, data in splits.items():
        path = args.output_dir / f"{split}-v1.1.json"
        path.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")
        print(summarise(path, data))


if __name__ == "__main__":
    main()
