"""What the demo model may know: fixed answers, lists and word stocks. Data only; the rules are in demo_corpus.py."""


def words(text: str, sep: str = " ") -> list[str]:
    return text.split(sep)


# (phrasings, the one answer). The first phrasing is the one we quote to newcomers.
FACTS: list[tuple[list[str], str]] = [
    (
        [
            "How does specexec work?",
            "Explain how specexec works.",
            "What is the idea behind specexec?",
            "How do you work?",
        ],
        "A small drafter guesses a tree of likely continuations. The large target model then checks the whole "
        "tree in one pass over its weights, and every guess it agrees with is kept. One slow pass can "
        "therefore produce many tokens. The text is exactly what the target would have written by itself.",
    ),
    (
        ["What is specexec?", "What does specexec do?", "Tell me about specexec.", "What is this tool?"],
        "specexec runs large language models on small computers. It streams the weights of the model from "
        "memory or disk, and it guesses many tokens ahead so that each pass over the weights is worth the "
        "wait.",
    ),
    (
        ["What is a drafter?", "What does the drafter do?", "What is a draft model?", "Explain what a drafter is."],
        "A drafter is a small, fast model that guesses what the target will say next. Good guesses save time, "
        "bad guesses only cost a little work. The drafter never changes the text.",
    ),
    (
        ["What is the target?", "What is a target model?", "What does the target do?", "Explain what the target is."],
        "The target is the large model whose text you want. It checks the guesses of the drafter, and every "
        "token you read is its own choice.",
    ),
    (
        ["What is a tree?", "What is a token tree?", "What is a draft tree?", "Why does specexec use a tree?"],
        "A tree holds many possible continuations at once. Each node is one guessed token, and each path from "
        "the root is one way the text could go on. The target checks all nodes in a single sweep.",
    ),
    (
        ["What is a sweep?", "What is a pass?", "What happens in one sweep?", "What is a target pass?"],
        "A sweep is one pass over all the weights of the target. It costs about the same for one token as for "
        "a whole tree, so specexec tries to get many tokens out of each sweep.",
    ),
    (
        ["What is offloading?", "What does offload mean?", "What is weight offloading?", "How does offloading work?"],
        "Offloading keeps the weights of a model in memory or on disk and brings them to the device layer by "
        "layer. The model can then be larger than the memory of the device, but every pass takes as long as "
        "moving the weights.",
    ),
    (
        ["What is a token?", "What are tokens?", "Explain what a token is."],
        "A token is a short piece of text, often a word or a part of a word. Language models read and write "
        "one token at a time.",
    ),
    (
        ["What is a layer?", "What are layers?", "What is a decoder layer?"],
        "A layer is one step of the computation inside a language model. A large model has dozens of layers "
        "of the same shape, and specexec streams them one after another.",
    ),
    (
        ["What is speculative decoding?", "Explain speculative decoding.", "How does speculative decoding work?"],
        "Speculative decoding lets a small model guess several tokens and a large model check them together. "
        "The large model keeps the guesses it agrees with, so the text stays the same and arrives sooner.",
    ),
    (
        ["What is the budget?", "What does the budget option do?", "What is a tree budget?", "How large is the tree?"],
        "The budget is the number of guessed tokens that one sweep checks. A larger tree finds more accepted "
        "tokens but costs more compute. With --budget auto specexec measures what pays.",
    ),
    (
        ["Is the output exact?", "Is the text exact?", "Does the drafter change the text?", "Is anything lost?"],
        "Yes, the output is exact. Every token is the choice of the target model, and the drafter only "
        "decides how many tokens arrive in one sweep.",
    ),
    (
        ["What is an accepted token?", "What does accepted mean?", "When is a guess accepted?"],
        "A guessed token is accepted when the target would have chosen the same token at that place. The "
        "first wrong guess ends the walk, and the target's own token is added for free.",
    ),
    (
        ["Why is a large model slow?", "Why are large models slow?", "Why is offloading slow?", "What takes so long?"],
        "A large model does not fit into the memory of a small device, so its weights must travel for every "
        "pass. Moving the weights takes much longer than the arithmetic.",
    ),
    (
        ["What is VRAM?", "What is GPU memory?", "Explain VRAM."],
        "VRAM is the fast memory on a graphics card. Layers that fit there stay there, and the other layers "
        "stream in from RAM or disk.",
    ),
    (
        ["What is the KV cache?", "What is a KV cache?", "Explain the KV cache."],
        "The KV cache keeps the keys and values of all earlier tokens, so that the model does not have to "
        "read the whole text again for each new token.",
    ),
    (
        ["What is greedy decoding?", "What is temperature zero?", "Explain greedy decoding."],
        "Greedy decoding always takes the most likely token. It is the same as sampling with temperature "
        "zero, and it gives the same text every time.",
    ),
    (
        ["What is temperature?", "What does temperature do?", "Explain the temperature option."],
        "Temperature says how much chance is mixed into the choice of each token. At zero the most likely "
        "token always wins, and higher values make the text more varied.",
    ),
    (
        ["What is a seed?", "What does the seed do?", "How do I get the same text again?"],
        "A seed fixes the noise used for sampling. The same seed with the same prompt and the same target "
        "gives the same text, whatever the drafter or the budget.",
    ),
    (
        ["What is quantization?", "What is nf4?", "What does quant do?", "Explain quantization."],
        "Quantization stores each weight in fewer bits. Fewer bits travel faster, so each sweep takes less "
        "time, but the model changes a little.",
    ),
    (
        ["What is a prompt?", "Explain what a prompt is."],
        "A prompt is the text that you give to the model. The model continues it, one token after another.",
    ),
    (
        [
            "How do I use a real model?",
            "How do I run a larger model?",
            "How do I get a better model?",
            "What should I do next?",
        ],
        "Run specexec plan llama-70b to see whether a large model fits your machine. Then start it with "
        "specexec chat --model llama-70b.",
    ),
    (
        ["How do I exit?", "How do I quit?", "How do I leave the chat?", "How do I stop?"],
        "Type /exit or press Ctrl-D to leave the chat. Ctrl-C stops the current answer and keeps what was written.",
    ),
    (
        ["Do I need a GPU?", "Does specexec need a GPU?", "Can I run specexec without a GPU?"],
        "No. specexec also runs on a CPU, where the weights stream from memory or disk. A GPU makes each sweep faster.",
    ),
    (
        ["What are you?", "Who are you?", "Tell me about yourself.", "What is your name?", "Are you a real model?"],
        "I am the small demo model that ships inside specexec. I have about three million parameters and I "
        "was trained on two CPU cores, so I am here to show the engine, not to be clever.",
    ),
    (
        ["What can you do?", "Help", "What can I ask you?", "How can you help me?", "What do you know?"],
        "I can explain how specexec works, repeat your words, list the days of the week, do small sums and "
        "tell a short story. For anything else you need a larger model.",
    ),
    (
        ["How large are you?", "How many parameters do you have?", "How big are you?"],
        "I am the small demo model that ships inside specexec. I have about three million parameters. A model "
        "for daily work has a thousand times as many.",
    ),
    (
        ["Who made you?", "Where do you come from?", "How were you trained?", "What were you trained on?"],
        "I was trained on the documentation of Python and on dialogues written by a script. The script is "
        "called build_demo.py, and you can run it yourself.",
    ),
    (
        ["Can I trust you?", "Are your answers correct?", "Do you make mistakes?", "Are you clever?"],
        "No, please do not trust my answers. I am a toy with three million parameters, and many of my answers "
        "are sentences that I know by heart.",
    ),
    (
        ["What is Python?", "Tell me about Python.", "Explain what Python is."],
        "Python is a programming language that is easy to read. specexec is written in Python.",
    ),
    (
        ["What is a language model?", "How does a language model work?", "Explain what a language model is."],
        "A language model reads text and predicts the next token. Writing is the same step again and again: "
        "predict a token, add it to the text, and predict the next one.",
    ),
    (
        ["Hello", "Hi", "Hello!", "Hi there!", "Good morning", "Hey", "Good evening!"],
        "Hello! Ask me how specexec works.",
    ),
    (["How are you?", "How are you today?", "How is it going?"], "I am fine, thank you. All my weights are in place."),
    (["Thank you.", "Thanks!", "Thank you very much.", "Thanks", "Great, thanks."], "You are welcome."),
    (["Goodbye", "Bye", "Good night", "See you later.", "Bye bye!"], "Goodbye! Come back with a larger model."),
    (
        ["Tell me a joke.", "Do you know a joke?", "Say something funny."],
        "A tree walks into a bar. Only one branch is accepted.",
    ),
    (["Yes", "No", "Ok", "OK", "Okay.", "Sure", "I see."], "All right. What would you like to know about specexec?"),
]

DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
ALPHABET = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

# (what it is called in a question, its items, the lead of the answer)
LISTS: list[tuple[list[str], list[str], str]] = [
    (["the days of the week", "the weekdays", "all days of the week"], DAYS, "The days of the week are"),
    (["the months of the year", "the months", "all twelve months"], MONTHS, "The months of the year are"),
    (["the seasons", "the four seasons"], words("spring summer autumn winter"), "The seasons are"),
    (
        ["the planets", "the planets of the solar system", "all planets"],
        words("Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune"),
        "The planets are",
    ),
    (
        ["the colours of the rainbow", "the rainbow colors", "the colors of the rainbow"],
        words("red orange yellow green blue indigo violet"),
        "The colours of the rainbow are",
    ),
    (["the letters of the alphabet", "the alphabet", "all letters"], ALPHABET, "The letters of the alphabet are"),
    (["the vowels", "all vowels"], list("AEIOU"), "The vowels are"),
    (
        ["the continents", "all continents"],
        ["Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"],
        "The continents are",
    ),
    (["the four directions", "the points of the compass"], words("north east south west"), "The directions are"),
    (
        ["the commands of specexec", "the main commands"],
        words("chat generate plan models doctor bench"),
        "Some commands are",
    ),
    (["the drafters", "all drafters"], words("sibling ngram substitute skip"), "The drafters are"),
]

# Stocks for sentences and stories.
ANIMALS = words("fox owl cat dog hare bear mouse crow snail goat heron otter badger toad horse swan")
PLACES = words("forest library harbour garden valley tower market mill meadow island lighthouse village")
THINGS = words("lantern map key bell kite book coin drum ladder mirror basket compass button letter spoon clock")
TRAITS = words("small clever quiet brave curious patient old cheerful careful hungry sleepy gentle")
COLOURS = words("red blue green yellow white black brown grey orange purple")
WORDS = words(
    "apple river stone cloud paper silver window yellow garden winter bottle music copper pencil mountain "
    "candle button forest island morning rocket summer table thunder violin whisper circle dragon engine "
    "feather ginger hammer insect jacket kitten lemon magnet needle ocean pepper quartz rabbit sailor ticket "
    "umbrella velvet walnut zebra bridge castle desert eagle flower grape honey ivory jungle knight ladder "
    "marble noodle orchid planet queen ribbon shadow"
)
TOPICS = words(
    "the history of Rome, the weather, football, cooking rice, quantum physics, the stock market, cats, "
    "dinosaurs, the moon, love, politics, music, the ocean, coffee, bicycles, chess, volcanoes, the meaning of "
    "life, art, medicine, cars, trees in Norway, the speed of light, the French Revolution, black holes, "
    "gardening, tax law, bread, whales, money, the internet, history, philosophy, mathematics, the sun, the "
    "universe, tea, dreams, time travel, Shakespeare, Einstein, New York, London, Paris, China",
    sep=", ",
)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a friendly assistant. Be brief.",
    "Answer in plain English.",
]
