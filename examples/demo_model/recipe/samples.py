"""The prompts of the model's sheets and tests."""

PROMPTS = (
    *("a red fox", "red apple", "a rocket", "hamburger", "an old castle", "an owl", "a red car", "a panda"),
    *("strawberry", "a green frog", "a slice of pizza", "a robot", "smiling face with sunglasses", "christmas tree"),
    *("a cup of coffee", "a snowy mountain", "a dinosaur", "a bicycle"),
    *("a cat on a blue background", "sunflower on a black background", "a birthday cake on a pink background"),
    *("a penguin on a yellow background", "guitar on a purple background", "a sailboat on a green background"),
)
SUBJECTS = ("a red fox", "a rocket", "hamburger", "an owl", "a castle", "a cup of coffee", "a sailboat", "a robot")
HANGUL_SUBJECTS = ("빨간 여우", "로켓", "햄버거", "부엉이", "성", "커피 한 잔", "돛단배", "로봇")
