"""Short texts on which ways to split and to merge text differ: they tell tokenizers apart, where anything does."""

from itertools import product

_WORDS_TEXT = (
    "library Library LIBRARY camelCase snake_case kebab-case x café Größe naïve ÉCOLE Москва ελληνικά עברית العربية "
    "हिन्दी ภาษาไทย 你好 日本語 カタカナ 한국어 ქართული Հայերեն ǅungla ﬁne ａｂｃ ⅷ ½ ٣٤٥ １２３ x² H₂O µm 𝒳𝒴 ꙮ ᏣᎳᎩ"
)
_NUMBERS_TEXT = "0 7 42 123 1987 12345 1234567890 3.14159 1,000,000 1e-10 0xFF 50% $9.99"
_MARKS_TEXT = (
    "! ... ?! -- — (a) [1] {} <b> a/b a\\b @me #1 *x* `x` ~ ^ & += -> :: "
    "\"q\" 'q' “q” «q» ¿qué? 。 、 ！ ・ €5 °C © ™ → ≠ ∑"
)
_WORDS, _NUMBERS, _MARKS = _WORDS_TEXT.split(), _NUMBERS_TEXT.split(), _MARKS_TEXT.split()
_BLANKS = (
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\t\t",
    " " * 8,
    "\u00a0",
    "\u3000",
)
_LINES = (
    "I'm sure they'll say it's what we've got; you'd know, they're HERE'S I'M WE'LL DON'T",
    "Don’t can’t it’s (with the other apostrophe)",
    "def area(radius):\n    return 3.14159 * radius ** 2\n\n\nprint(area(10))\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; } // C",
    "\tif x == None:\n\t\treturn\n",
    "<html>\n  <body class=\"x\">&nbsp;</body>\n</html>",
    "SELECT * FROM t WHERE a='b' AND c>=10;",
    "{\"key\": [1, 2.5, null, true], \"nested\": {\"a\": \"b\\n\"}}",
    "https://example.org/path?x=1&y=two#three",
    "someone@example.org, C:\\Users\\x, /usr/local/bin",
    "\\frac{a}{b} = \\sum_{i=1}^{n} x_i^2",
    "2024-02-29T12:34:56Z 12:30pm 555-0100 1st 2nd",
    "😀 😀😀 👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️",
    "𠮷野家で食べる。「はい」と言った。",
    "他说：“1987年，有4200本书。”",
    "नमस्ते दुनिया १२३",
    "مرحبا بالعالم ١٢٣",
    "zero\u200bwidth soft\u00adhyphen joiner\u200d",
    "e\u0301 is not \u00e9 until it is composed; \u1e9b\u0323",
    "\ufeffmark in front",
    "control \x01 and \x7f",
    "a\n\n\n\nb    c\t\td \n e",
    "trailing blanks   ",
    "   leading blanks",
    "\n",
    " ",
    "    ",
    "_under _score_ __init__",
    "ALLCAPSWORDS lowercasewords MiXeD",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!!!!!!!!!!!!!! ................",
    "==== ---- ____ ####",
    "1 12 123 1234 12345 123456",
    "a1b2c3 1a2b3c A1B2",
    "The library stood at the corner of two quiet streets. In 1923 its founder gave 4,200 books to the town.",
    "Les livres ne manquent jamais de lecteurs; die Leser brauchen nur Zeit.",
)  # fmt: skip

ODD_TEXTS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *_LINES,
            *(f"{blank}{word} {word}{blank}{word}" for word, blank in zip(_WORDS, _BLANKS * 3, strict=False)),
            *(f"{word}{number} {number}{word}" for word, number in zip(_WORDS, _NUMBERS * 3, strict=False)),
            *(f"{word}{mark}{word} {mark}{word}{mark} {mark}" for word, mark in zip(_WORDS * 2, _MARKS, strict=False)),
            *(f"a{one}{other}b" for one, other in product(_BLANKS[1:8], repeat=2)),
            *(f" {mark}\n{mark} \n" for mark in _MARKS[::3]),
        ]
    )
)  # fmt: skip
