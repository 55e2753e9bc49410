"""Ways to damage a file. Each takes its bytes and a seeded generator and gives other bytes, or None if it cannot.

BYTES knows nothing of formats; TEXT, JSON, CSV and JINJA build files that are well formed and hold what nobody expects.
Those of binary formats are in containers.py.
"""

import csv
import io
import json
from collections.abc import Callable
from random import Random

Mutator = Callable[[bytes, Random], bytes | None]
SENTINEL = "code-was-run"  # a file of this name in the working folder tells that a payload ran
LONGEST = 1 << 20  # bytes of a mutated file, so that the time that a reader needs stays small
INTEGERS = (0, 1, 2, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
PIECES = (
    *(b"", b"\0", b"\0" * 64, b"\n", b"\r\n", b"\n\n", b'"', b'""', b"'", b",", b"\\", b"{", b"}", b"[" * 2000),
    *(b'{"a":' * 2000, b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"1.5", b"\xff\xfe", b"\xed\xa0\x80"),
    *(b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\x1b[31m\x1b]0;title\x07", b"\\ud800", b"\\u0000", b"null"),
    *(b"true", "\u202e\u200b\u2028\x85\x0c".encode(), b"%s%n{0}{a}", b"__import__('os')", b"../../x", b"A" * 70000),
)


def place(data: bytes, rng: Random) -> tuple[int, int]:
    """Begin and end of some piece of `data`, short ones more often than long ones."""
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + int(2 ** rng.uniform(0, 12)))


def flip_bits(data: bytes, rng: Random) -> bytes | None:
    if not data:
        return None
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.choice((0, 1, 4, len(data) - 1, rng.randrange(len(data) + 1)))]


def cut_out(data: bytes, rng: Random) -> bytes:
    begin, end = place(data, rng)
    return data[:begin] + data[end:]


def duplicate(data: bytes, rng: Random) -> bytes:
    begin, end = place(data, rng)
    return data[:begin] + data[begin:end] * rng.choice((2, 3, 50)) + data[end:]


def splice(data: bytes, rng: Random) -> bytes:
    begin, end = place(data, rng)
    at, _ = place(data, rng)
    return data[:at] + data[begin:end] + data[at:]


def overwrite(data: bytes, rng: Random) -> bytes:
    begin, end = place(data, rng)
    return data[:begin] + bytes([rng.choice((0, 255, 32))]) * (end - begin) + data[end:]


def insert_piece(data: bytes, rng: Random) -> bytes:
    at, end = place(data, rng)
    return data[:at] + rng.choice(PIECES) + data[at if rng.random() < 0.5 else end :]


def set_integer(data: bytes, rng: Random) -> bytes | None:
    """A length, a count or an offset that lies, most often near the beginning or the end where headers are."""
    size = rng.choice((1, 2, 4, 8))
    if len(data) < size:
        return None
    near = min(len(data) - size, 256)
    at = rng.choice((rng.randint(0, near), len(data) - size - rng.randint(0, near), rng.randint(0, len(data) - size)))
    value = rng.choice((*INTEGERS, len(data), len(data) + 1, rng.getrandbits(64))) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "little", "big"))) + data[at + size :]


def add_bom(data: bytes, rng: Random) -> bytes:
    return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf" * 2)) + data


def surround(data: bytes, rng: Random) -> bytes:
    junk = rng.randbytes(rng.choice((1, 7, 512)))
    return rng.choice((junk + data, data + junk, b"", b"\0" * len(data), rng.randbytes(len(data) % 5000)))


BYTES: tuple[Mutator, ...] = (
    *(flip_bits, truncate, cut_out, duplicate, splice, overwrite, insert_piece, set_integer, set_integer, add_bom),
    surround,
)


def recode(data: bytes, rng: Random) -> bytes:
    text = data.decode("utf-8", errors="replace")
    return text.encode(rng.choice(("utf-16", "utf-16-be", "utf-32", "latin-1", "utf-8-sig", "cp037")), errors="replace")


def line_ends(data: bytes, rng: Random) -> bytes:
    ends = (b"\r\n", b"\r", b"\n\r", b"\n\n\n", b"\x0b", "\u2028".encode())
    return data.replace(b"\n", rng.choice(ends))


def lines(data: bytes, rng: Random) -> bytes:
    """Lines shuffled, repeated, or left out."""
    rows = data.split(b"\n")
    picked = (rng.sample(rows, len(rows)), rows * 3, [r for r in rows if rng.random() < 0.7], rows[:1], rows[1:], rows)
    return b"\n".join(rng.choice(picked))


TEXT: tuple[Mutator, ...] = (recode, line_ends, lines, insert_piece, insert_piece)


def odd(rng: Random) -> object:
    """A JSON value that nobody expects."""
    nested: object = 1
    for _ in range(rng.choice((3, 300))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    long = 10 ** rng.choice((10, 25, 400))
    return rng.choice(
        [
            *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, long, -long, 0.5, 1e308, float("nan"), float("inf")),
            *("", " ", "\0", "\ud800", "x" * 3000, "1", "true", "NaN", "\n\n\n", "\u202e", "../../etc", [], {}, nested),
            *([None], [1], ["a"], {"role": "user"}, [{"role": "user", "content": None}], {"": ""}, [[[]]], "\x1b[2J"),
            *({"role": "assistant", "content": "x"}, [{"role": "assistant", "content": "x"}], "lora", "x070", 1e-320),
        ]
    )


def nodes(value: object, found: list | None = None) -> list[tuple]:
    """(container, key) of everything inside `value`."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        found.append((value, key))
        if len(found) < 2000:
            nodes(item, found)
    return found


def change(value: object, rng: Random) -> object:
    """Another JSON value: a node replaced, removed, renamed or doubled."""
    places = nodes(value)
    if not places or rng.random() < 0.05:
        return odd(rng)
    for _ in range(rng.choice((1, 1, 2, 5))):
        box, key = rng.choice(places)
        if (isinstance(box, dict) and key not in box) or (isinstance(box, list) and key >= len(box)):
            continue
        what = rng.random()
        if what < 0.7:
            box[key] = odd(rng)
        elif what < 0.8:
            del box[key]
        elif isinstance(box, dict):
            box[rng.choice(("", " PROMPT ", "role", "text", "messages", str(key).upper(), "\0"))] = box[key]
        else:
            box.insert(key, box[rng.randrange(len(box))])
    return value


def json_values(data: bytes, rng: Random) -> bytes | None:
    """One JSON document, or one a line, with odd values in it."""
    try:
        whole = json.loads(data)
        return json.dumps(change(whole, rng)).encode()
    except (ValueError, RecursionError):
        rows = data.split(b"\n")
    at = rng.randrange(len(rows))
    try:
        rows[at] = json.dumps(change(json.loads(rows[at]), rng), ensure_ascii=rng.random() < 0.5).encode(
            "utf-8", errors="surrogatepass"
        )
    except (ValueError, RecursionError):
        return None
    return b"\n".join(rows)


JSON: tuple[Mutator, ...] = (json_values, json_values, json_values, *TEXT)


def cells(data: bytes, rng: Random) -> bytes | None:
    """A CSV with odd cells, columns or rows."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline="")))
    except (UnicodeDecodeError, csv.Error):
        return None
    rows = [row for row in rows if row]
    if not rows:
        return None
    words = ("nan", "inf", "-1", "1e400", "0", "", "1_000", "\u0661", "freeze", "lora", "full", "miss", "emb", "att")
    for _ in range(rng.choice((1, 2, 6))):
        row = rng.choice(rows)
        at = rng.randrange(len(row))
        row[at] = rng.choice((*words, str(odd(rng))[:5000], row[at] * 40, rng.choice(rng.choice(rows))))
    rng.choice((lambda: None, lambda: rows.append(rows[0]), lambda: rows[0].append("prompt"), lambda: rows[-1].pop()))()
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=rng.choice(("\n", "\r\n"))).writerows(rows)
    return text.getvalue().encode("utf-8", errors="surrogatepass")


CSV: tuple[Mutator, ...] = (cells, cells, cells, *TEXT)


EVIL = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch code-was-run') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('touch code-was-run').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ messages.append({}) }}",
    "{{ messages.__class__ }}",
    "{{ ''|attr('__class__')|attr('__base__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% for x in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**12 }}",
    "{{ 9**9**9 }}",
    "{{ 'a'.ljust(10**11) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>99999999999}'.format('a') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ range(99999)|list }}",
    "{{ lipsum(n=100000) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{{ raise_exception('no ' * 100000) }}",
    "{{ raise_exception('\x1b[2J') }}",
    "{{ [1]|sum(start='a') }}",
    "{{ 1/0 }}",
    "{{ undefined.x.y }}",
    "{% break %}",
    "{{ messages[10**30] }}",
    "{{ '\\ud800' }}",
)
# each costs the whole time that a template has: some of them are enough
SLOW = (
    "{% set n = 99999 %}{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999).replace('b', 'c' * 99999) | length }}",
)


def template(data: bytes, rng: Random) -> bytes:
    """A program that wants out of its sandbox, or never ends."""
    evil = rng.choice(SLOW) if rng.random() < 0.01 else rng.choice(EVIL)
    if data.lstrip().startswith(b'{"'):
        try:
            config = json.loads(data)
            config["chat_template"] = evil + str(config.get("chat_template"))
            return json.dumps(config).encode()
        except (ValueError, RecursionError, AttributeError):
            return data
    at = rng.choice((0, len(data), rng.randrange(len(data) + 1)))
    return data[:at] + evil.encode("utf-8", "surrogatepass") + data[at:]


JINJA: tuple[Mutator, ...] = (template, template, *TEXT)


def yaml_values(data: bytes, rng: Random) -> bytes:
    """A YAML file with odd values, keys, anchors, tags and bombs."""
    odd_words = (
        "!!python/object/apply:os.system ['touch code-was-run']",
        "&a [*a]",
        "*nowhere",
        "!!binary x",
        "2026-11-27",
    )
    more = (
        "1e-5",
        ".nan",
        ".inf",
        "0x1F",
        "1_000",
        "0o17",
        "12:30:45",
        "~",
        "yes",
        "No",
        "[1, 2]",
        "{a: b}",
        "|\n  x",
        "? x",
    )
    rows = data.decode("utf-8", errors="replace").split("\n")
    at = rng.randrange(len(rows))
    key = rows[at].partition(":")[0]
    rows[at] = rng.choice(
        (f"{key}: {rng.choice((*odd_words, *more))}", f"{key}: {odd(rng)!r:.300}", f"{rng.choice(more)}: 1")
    )
    if rng.random() < 0.05:
        bomb = ["a: &a [x,x,x,x,x,x,x,x,x]"]
        bomb += [f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi")]
        rows = bomb + rows
    return "\n".join(rows).encode("utf-8", errors="surrogatepass")


YAML: tuple[Mutator, ...] = (yaml_values, yaml_values, *TEXT)
