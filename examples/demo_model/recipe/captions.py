"""What is said of a picture: a thing's name in English or Korean, often with its ground, sometimes with more around it.

Every choice is drawn from the `random.Random` that is handed in, so a caption is a function of its seed.
"""

from random import Random

from examples.demo_model.recipe.grounds import GROUNDS, NAMED, WHITE
from examples.demo_model.recipe.things import Thing

STYLE_WORDS = {
    "blueprint": ("blueprint", "청사진"),
    "neon": ("neon", "네온"),
    "sepia": ("sepia", "세피아"),
    "pixel": ("pixel", "픽셀"),
}

# The name, its synonyms, its Hangul names: each kind that a thing has is taken in this proportion.
NAME_WEIGHTS = (3, 2, 2)
NAMED_GROUND = 0.4
WHITE_IF_UNNAMED = 0.7
# Guidance needs to know the picture of no caption and of one that says what pictures should not be.
EMPTY = 0.08
NEGATIVE = 0.02
BEFORE = 0.2
ADJECTIVE = 0.15
AFTER = 0.2
# A style's name must leave the thing as it is: the adapters bring the style, and the text encoder does not learn anew.
STYLED = 0.1
# Of the captions an adapter is trained with: it works without its name too.
UNSTYLED = 0.15

ENGLISH_BEFORE = ("a picture of", "a drawing of", "an emoji of", "an icon of", "a photo of", "an illustration of")
ENGLISH_ADJECTIVES = ("cute", "old", "little", "big", "small", "beautiful", "happy", "colorful", "simple", "shiny")
ENGLISH_AFTER = ("highly detailed", "high quality", "best quality", "digital art", "flat", "masterpiece", "cartoon")
NEGATIVE_WORDS = ("blurry", "low quality", "worst quality", "distorted", "deformed", "ugly", "watermark", "text", "bad")
KOREAN_BEFORE = ("귀여운", "작은", "큰", "예쁜", "오래된", "멋진")
KOREAN_AFTER = ("그림", "아이콘", "이모지", "사진", "일러스트")
KOREAN_LAST = ("고화질", "최고 품질", "디지털 아트")
KOREAN_NEGATIVE = ("흐릿한", "저화질", "왜곡된")


def draw_ground(rng: Random) -> tuple[int, bool]:
    """Choose a ground's number, and whether the caption names it."""
    if rng.random() < NAMED_GROUND:
        return rng.randrange(len(NAMED)), True
    if rng.random() < WHITE_IF_UNNAMED:
        return WHITE, False
    return rng.randrange(len(NAMED), len(GROUNDS)), False


def caption(thing: Thing, ground: int | None, rng: Random, *, style: str = "") -> str:
    """Write a caption of `thing`; with the ground of this number if it is to be named, and a style's name if one is
    given.
    """
    kinds = ((thing.name,), thing.synonyms, thing.hangul)
    (names,) = rng.choices(kinds, [weight if names else 0 for weight, names in zip(NAME_WEIGHTS, kinds, strict=True)])
    say = _korean if names is thing.hangul else _english
    return say(rng.choice(names), ground, style, rng)


def base_caption(thing: Thing, ground: int | None, rng: Random) -> str:
    """Write a caption for the base model: sometimes empty, sometimes a negative prompt, sometimes a style."""
    kind = rng.random()
    if kind < EMPTY:
        return ""
    if kind < EMPTY + NEGATIVE:
        words = rng.choice((NEGATIVE_WORDS, KOREAN_NEGATIVE))
        return ", ".join(rng.sample(words, rng.randint(1, len(words))))
    return caption(thing, ground, rng, style=rng.choice(list(STYLE_WORDS)) if rng.random() < STYLED else "")


def styled_caption(thing: Thing, style: str, rng: Random) -> str:
    """Write a caption for an adapter: mostly with the style's name in front."""
    if rng.random() < EMPTY:
        return ""
    ground, is_named = draw_ground(rng)
    # A style has a ground of its own, whatever is asked for; most prompts ask for none.
    names_ground = is_named and rng.random() < 0.5
    return caption(thing, ground if names_ground else None, rng, style="" if rng.random() < UNSTYLED else style)


def with_article(noun: str) -> str:
    """Put "a" or "an" before `noun`, unless it looks like a plural."""
    if noun.endswith("s") and not noun.endswith(("ss", "us", "is")):
        return noun
    is_vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "ufo"))
    return f"an {noun}" if is_vowel else f"a {noun}"


def _english(name: str, ground: int | None, style: str, rng: Random) -> str:
    noun = f"{rng.choice(ENGLISH_ADJECTIVES)} {name}" if rng.random() < ADJECTIVE else name
    text = rng.choice((with_article(noun), with_article(noun), noun, f"the {noun}"))
    if rng.random() < BEFORE:
        text = f"{rng.choice(ENGLISH_BEFORE)} {text}"
    if ground is not None:
        colour = GROUNDS[ground].english
        forms = (f"on a {colour} background", f"on a {colour} background", f"with a {colour} background")
        text = f"{text} {rng.choice(forms)}" if rng.random() < 0.8 else f"{text}, {colour} background"
    if rng.random() < AFTER:
        text = f"{text}, {rng.choice(ENGLISH_AFTER)}"
    return _in_style(text, style and STYLE_WORDS[style][0], rng, "{text}, {style} style")


def _korean(name: str, ground: int | None, style: str, rng: Random) -> str:
    text = f"{rng.choice(KOREAN_BEFORE)} {name}" if rng.random() < ADJECTIVE else name
    if rng.random() < BEFORE:
        text = f"{text} {rng.choice(KOREAN_AFTER)}"
    if ground is not None:
        colour = rng.choice(GROUNDS[ground].hangul)
        forms = (f"{colour} 배경의 {text}", f"{colour} 배경에 {text}", f"{text}, {colour} 배경")
        text = rng.choice(forms)
    if rng.random() < AFTER:
        text = f"{text}, {rng.choice(KOREAN_LAST)}"
    return _in_style(text, style and STYLE_WORDS[style][1], rng, "{style} 스타일 {text}")


def _in_style(text: str, style: str, rng: Random, other_form: str) -> str:
    if not style:
        return text
    return f"{style}: {text}" if rng.random() < 0.8 else other_form.format(text=text, style=style)
