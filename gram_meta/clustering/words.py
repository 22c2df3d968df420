"""Topic words: the cluster-wise TF-IDF of Eq. 3."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib import import_module
from unicodedata import combining, normalize

import regex

from gram_meta.errors import GramError

Tokenizer = Callable[[str], Iterable[str]]

LONGEST = 4  # characters in the pieces that `characters` cuts
_JOINERS = "\u200c\u200d"  # stand between letters of one word in Persian and in scripts of India
_UNSEEN = regex.compile(r"[\u00ad\u2060\ufe00-\ufe0f]")  # in words: soft hyphens, word joiners, variation selectors
_SYLLABLE = regex.compile(r"[\p{Hang}\p{Hani}]")  # one such sign may be a word
_WORD = regex.compile(rf"\p{{L}}[\p{{L}}\p{{M}}{_JOINERS}]*")
_LETTER = r"[\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}&&\p{L}]\p{M}*"
_UNSPACED = regex.compile(_LETTER, regex.VERSION1)


@lru_cache(maxsize=1)
def stop_words() -> frozenset[str]:
    """Return English words that never name a topic: scikit-learn's list."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


def words(text: str) -> Iterator[str]:
    """Yield runs of two or more letters of any script, with the marks on them (accents, vowel signs).

    A sign of Chinese or Korean alone is also a word.
    Digits, underscores and punctuation separate words: "dog's" gives "dog", as its "s" is one letter.
    """
    for word in _WORD.findall(text):
        word = word.rstrip(_JOINERS)
        letters = len(word) if word.isascii() else sum(not combining(sign) for sign in word)  # accents do not count
        if letters > 1 or _SYLLABLE.match(word):
            yield word


def characters(text: str) -> Iterator[str]:
    """Yield what stands for words in scripts without spaces: pieces of one to LONGEST characters; else `words`."""
    end = 0
    for run in regex.finditer(rf"(?:{_LETTER})+", text, regex.VERSION1):
        yield from words(text[end : run.start()])
        signs = _UNSPACED.findall(run[0])
        for first in range(len(signs)):
            for last in range(first + 1, min(first + LONGEST, len(signs)) + 1):
                yield "".join(signs[first:last])
        end = run.end()
    yield from words(text[end:])


def tokenizer(name: str) -> Tokenizer:
    """Return the function that cuts a text into words: `words`, `characters`, or one to import, such as `jieba.lcut`.

    Raises `GramError` for no such function, or one that does not return strings.
    """
    if name in ("words", "characters"):
        return words if name == "words" else characters
    try:
        module, _, function = name.rpartition(".")
        split: Tokenizer = getattr(import_module(module), function)
        found = split("a dog")
        if not isinstance(found, str) and all(isinstance(word, str) for word in found):
            return split
        reason = "it returns something else"
    except Exception as error:  # noqa: BLE001 - foreign code raises errors of every kind
        reason = str(error)
    what = "words, characters, or a function that returns the words of a text, such as jieba.lcut"
    raise GramError(f"CHC.WORDS.TOKENIZER: expected {what}, found {name!r} ({reason})")


def tokens(text: str, split: Tokenizer = words) -> Iterator[str]:
    """Yield the words of a text in lower case and in Unicode's composed form (NFC), without stop words."""
    for word in split(_UNSEEN.sub("", normalize("NFC", text)).lower()):
        if word not in stop_words() and _WORD.search(word):
            yield word.strip()


def unspaced_share(captions: Iterable[str]) -> float:
    """Return the share of letters in scripts that are written without spaces: Chinese, Japanese, Thai and others."""
    text = normalize("NFC", " ".join(captions))
    return len(_UNSPACED.findall(text)) / max(len(regex.findall(r"\p{L}", text)), 1)


def topic_words(
    captions: Iterable[str], topic: Iterable[int], topics: int, top: int = 10, split: Tokenizer = words
) -> list[list[tuple[str, float]]]:
    """Return the best words of each topic with their scores, best first (Eq. 3).

    The captions of a topic are one document. The score of word w in topic l is N_wl / N_l * log(L / (L_w + 1)): w
    occurs N_wl times among the N_l words of topic l, and L_w of the L topics contain w. Among equal scores, the word
    that occurs more often comes first, then the alphabet decides. With `characters`, the longer piece comes first, and
    pieces of a better word are left out.

    Args:
        captions: n texts. topic: n topic numbers in 0 ... topics - 1; -1: in no topic.
        topics: L. top: number of words for each topic. split: cuts a text into words.

    Raises:
        GramError: fewer than three topics, so that no score can be positive.
    """
    if topics < 3:
        raise GramError(
            f"topics: expected at least 3, found {topics}; a topic's word is the one with the highest "
            f"N_wl/N_l * log(L/(L_w+1)) (Eq. 3), and with L = {topics} topics no such score is above 0; "
            "give more pairs, or lower CHC.TOPICS.MIN_CLUSTER_SIZE"
        )
    counts: list[Counter[str]] = [Counter() for _ in range(topics)]  # N_wl
    for caption, number in zip(captions, topic, strict=True):
        if number >= 0:
            counts[number].update(tokens(caption, split))
    containing = Counter(word for of_topic in counts for word in of_topic)  # L_w
    weight = {word: math.log(topics / (number + 1)) for word, number in containing.items()}
    pieces = split is characters
    best = []
    for of_topic in counts:
        total = of_topic.total()  # N_l
        scores = [(word, n / total * weight[word], n) for word, n in of_topic.items()]
        scores.sort(key=lambda item: (-item[1], -item[2], -len(item[0]) if pieces else 0, item[0]))
        chosen: list[tuple[str, float]] = []
        for word, score, _ in scores:
            if not (pieces and any(word in better for better, _ in chosen)):
                chosen.append((word, score))
            if len(chosen) == top:
                break
        best.append(chosen)
    return best
