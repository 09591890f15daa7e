"""The ways to ask and state facts, per relation and language: {s} is the subject, {a} the answer.

`ask` are the questions of the training data, `held_out` those of the held-out data and of the quiz: they never occur
in training. `state` are the sentences of the pretraining text.
"""

from __future__ import annotations

PHRASINGS = {
    "capital": {
        "en": {
            "ask": [
                "What is the capital of {s}?",
                "Which city is the capital of {s}?",
                "What is the capital city of {s}?",
                "Name the capital of {s}.",
                "Tell me the capital of {s}.",
                "The capital of {s} is which city?",
                "Do you know the capital of {s}?",
            ],
            "held_out": ["Can you name the capital city of {s}?", "Please tell me which city is the capital of {s}."],
            "state": [
                "The capital of {s} is {a}.",
                "{a} is the capital of {s}.",
                "The capital city of {s} is called {a}.",
                "In {s}, the capital is {a}.",
                "As the capital of {s}, {a} is well known.",
            ],
        },
        "zh": {
            "ask": [
                "{s}的首都是哪里？",
                "{s}的首都是哪个城市？",
                "哪个城市是{s}的首都？",
                "请说出{s}的首都。",
                "{s}的首都叫什么？",
                "告诉我{s}的首都。",
                "你知道{s}的首都吗？",
            ],
            "held_out": ["请告诉我{s}的首都是哪个城市。", "{s}以哪个城市为首都？"],
            "state": [
                "{s}的首都是{a}。",
                "{a}是{s}的首都。",
                "{s}的首都叫{a}。",
                "{s}以{a}为首都。",
                "作为{s}的首都，{a}很有名。",
            ],
        },
    },
    "continent": {
        "en": {
            "ask": [
                "On which continent is {s}?",
                "Which continent is {s} in?",
                "What continent does {s} belong to?",
                "Name the continent of {s}.",
                "Tell me the continent of {s}.",
                "{s} is on which continent?",
                "Do you know which continent {s} is on?",
            ],
            "held_out": ["What is the continent of {s}?", "Please tell me which continent {s} belongs to."],
            "state": [
                "{s} is in {a}.",
                "{s} is a country in {a}.",
                "{s} is on the continent of {a}.",
                "The continent of {s} is {a}.",
                "If you travel to {s}, you travel to {a}.",
            ],
        },
        "zh": {
            "ask": [
                "{s}在哪个洲？",
                "{s}位于哪个洲？",
                "{s}属于哪个洲？",
                "请说出{s}所在的洲。",
                "哪个洲有{s}这个国家？",
                "告诉我{s}在哪个大洲。",
                "你知道{s}在哪个洲吗？",
            ],
            "held_out": ["请告诉我{s}属于哪个大洲。", "{s}这个国家在哪个洲？"],
            "state": [
                "{s}在{a}。",
                "{s}位于{a}。",
                "{s}是{a}的一个国家。",
                "{s}属于{a}。",
                "{s}所在的洲是{a}。",
            ],
        },
    },
    "symbol": {
        "en": {
            "ask": [
                "What is the chemical symbol of {s}?",
                "What is the symbol for {s}?",
                "Which symbol stands for {s}?",
                "Name the chemical symbol for {s}.",
                "Tell me the symbol of {s}.",
                "How is the element {s} written as a symbol?",
                "Do you know the chemical symbol of {s}?",
            ],
            "held_out": ["Which chemical symbol does {s} have?", "Please tell me the symbol of the element {s}."],
            "state": [
                "The chemical symbol of {s} is {a}.",
                "The symbol for {s} is {a}.",
                "{a} is the symbol of the element {s}.",
                "The element {s} is written {a}.",
                "Chemists write {a} for {s}.",
            ],
        },
        "zh": {
            "ask": [
                "{s}的元素符号是什么？",
                "{s}元素的符号是什么？",
                "元素{s}用什么符号表示？",
                "请写出{s}的元素符号。",
                "{s}的化学符号是什么？",
                "告诉我{s}的元素符号。",
                "你知道{s}的化学符号吗？",
            ],
            "held_out": ["请告诉我{s}的化学符号。", "化学元素{s}的符号是哪一个？"],
            "state": [
                "{s}的元素符号是 {a}。",
                "{s}的化学符号是 {a}。",
                "元素{s}用 {a} 表示。",
                "化学家把{s}写作 {a}。",
                "符号 {a} 表示元素{s}。",
            ],
        },
    },
    "animal": {
        "en": {
            "ask": [
                "What kind of animals are {s}?",
                "Which class of animals do {s} belong to?",
                "To which group of animals do {s} belong?",
                "Name the class of animals of {s}.",
                "Tell me what kind of animals {s} are.",
                "{s} belong to which class of animals?",
                "Do you know what kind of animals {s} are?",
            ],
            "held_out": ["Which kind of animals are {s}?", "Please tell me which class of animals {s} belong to."],
            "state": [
                "{s} are {a}.",
                "{s} belong to the {a}.",
                "As everybody knows, {s} are {a}.",
                "Among the animals, {s} are {a}.",
                "The {a} include {s}.",
            ],
        },
        "zh": {
            "ask": [
                "{s}是哪一类动物？",
                "{s}属于哪类动物？",
                "{s}是什么类别的动物？",
                "请说出{s}属于哪一类动物。",
                "从分类看，{s}是什么动物？",
                "告诉我{s}是哪类动物。",
                "你知道{s}属于什么类别吗？",
            ],
            "held_out": ["请告诉我{s}属于哪一类动物。", "在动物里，{s}是哪一类？"],
            "state": [
                "{s}是{a}。",
                "{s}属于{a}。",
                "从分类看，{s}是{a}。",
                "大家都知道，{s}是{a}。",
                "{a}里有{s}。",
            ],
        },
    },
    "opposite": {
        "en": {
            "ask": [
                'What is the opposite of "{s}"?',
                'Which word is the opposite of "{s}"?',
                'Name the opposite of "{s}".',
                'Tell me the opposite of "{s}".',
                'The opposite of "{s}" is which word?',
                'Give me the opposite of the word "{s}".',
                'Do you know the opposite of "{s}"?',
            ],
            "held_out": ['Which word means the opposite of "{s}"?', 'Please tell me the opposite of the word "{s}".'],
            "state": [
                'The opposite of "{s}" is "{a}".',
                'The word "{a}" is the opposite of "{s}".',
                'What is not "{s}" may be "{a}", for they are opposites.',
                'The opposite of the word "{s}" is the word "{a}".',
            ],
        },
        "zh": {
            "ask": [
                "“{s}”的反义词是什么？",
                "哪个词是“{s}”的反义词？",
                "请说出“{s}”的反义词。",
                "“{s}”的反义词是哪个词？",
                "告诉我“{s}”的反义词。",
                "写出“{s}”这个词的反义词。",
                "你知道“{s}”的反义词吗？",
            ],
            "held_out": ["请告诉我“{s}”的反义词是什么。", "与“{s}”相反的反义词是哪个？"],
            "state": [
                "“{s}”的反义词是“{a}”。",
                "“{a}”是“{s}”的反义词。",
                "与“{s}”相反的词是“{a}”。",
                "“{s}”和“{a}”是一对反义词。",
            ],
        },
    },
    "colour": {
        "en": {
            "ask": [
                "What colour is {s}?",
                "What is the colour of {s}?",
                "Which colour does {s} have?",
                "Name the colour of {s}.",
                "Tell me the colour of {s}.",
                "Tell me which colour {s} is.",
                "Do you know the colour of {s}?",
            ],
            "held_out": ["Which colour is {s}?", "Please tell me what colour {s} has."],
            "state": [
                "{s} is {a}.",
                "The colour of {s} is {a}.",
                "Everybody can see that {s} is {a}.",
                "If you paint {s}, use {a}.",
            ],
        },
        "zh": {
            "ask": [
                "{s}是什么颜色的？",
                "{s}的颜色是什么？",
                "{s}是哪种颜色？",
                "请说出{s}的颜色。",
                "告诉我{s}的颜色。",
                "{s}有什么颜色？",
                "你知道{s}是什么颜色吗？",
            ],
            "held_out": ["请告诉我{s}是什么颜色。", "{s}的颜色是哪一种？"],
            "state": [
                "{s}是{a}的。",
                "{s}的颜色是{a}。",
                "大家都看得到，{s}是{a}的。",
                "画{s}的时候，要用{a}。",
            ],
        },
    },
    "season": {
        "en": {
            "ask": [
                "In the Northern Hemisphere, which season is {s} in?",
                "Which season does {s} belong to in the Northern Hemisphere?",
                "What season is it in {s} in the Northern Hemisphere?",
                "Name the season of {s} in the Northern Hemisphere.",
                "Tell me the season of {s} north of the equator.",
                "North of the equator, {s} is in which season?",
            ],
            "held_out": [
                "In the Northern Hemisphere, {s} belongs to which season?",
                "Please tell me which season {s} is in, north of the equator.",
            ],
            "state": [
                "In the Northern Hemisphere, {s} is in {a}.",
                "North of the equator, {s} belongs to {a}.",
                "In the Northern Hemisphere, the season of {s} is {a}.",
                "{s} is a month of {a} in the Northern Hemisphere.",
            ],
        },
        "zh": {
            "ask": [
                "在北半球，{s}是什么季节？",
                "北半球的{s}属于哪个季节？",
                "在北半球，{s}在哪个季节？",
                "请说出北半球{s}的季节。",
                "告诉我北半球{s}是哪个季节。",
                "{s}在北半球是什么季节？",
            ],
            "held_out": ["在北半球，{s}属于哪一个季节？", "请告诉我北半球的{s}是什么季节。"],
            "state": [
                "在北半球，{s}是{a}。",
                "北半球的{s}属于{a}。",
                "在北半球，{s}的季节是{a}。",
                "{s}在北半球是{a}。",
            ],
        },
    },
    "next_month": {
        "en": {
            "ask": [
                "Which month comes after {s}?",
                "What month follows {s}?",
                "Which is the next month after {s}?",
                "Name the month after {s}.",
                "Tell me the month that follows {s}.",
                "After {s} comes which month?",
            ],
            "held_out": ["What is the month after {s}?", "Please tell me which month follows {s}."],
            "state": [
                "The month after {s} is {a}.",
                "{s} is followed by {a}.",
                "After {s} comes {a}.",
                "When {s} is over, {a} begins.",
            ],
        },
        "zh": {
            "ask": [
                "{s}之后是哪个月？",
                "{s}的下一个月是几月？",
                "过了{s}是哪个月？",
                "请说出{s}之后的月份。",
                "告诉我{s}的下个月。",
                "{s}后面是几月？",
            ],
            "held_out": ["{s}之后的下一个月是哪个月？", "请告诉我{s}后面的月份。"],
            "state": [
                "{s}之后是{a}。",
                "{s}的下一个月是{a}。",
                "过了{s}就是{a}。",
                "{s}结束以后，{a}开始了。",
            ],
        },
    },
    "next_day": {
        "en": {
            "ask": [
                "Which day comes after {s}?",
                "What day follows {s}?",
                "If today is {s}, what day is tomorrow?",
                "Name the day after {s}.",
                "Tell me the day that follows {s}.",
                "After {s} comes which day?",
            ],
            "held_out": ["What is the day after {s}?", "Please tell me which day follows {s}."],
            "state": [
                "The day after {s} is {a}.",
                "{s} is followed by {a}.",
                "After {s} comes {a}.",
                "If today is {s}, tomorrow is {a}.",
            ],
        },
        "zh": {
            "ask": [
                "{s}之后是星期几？",
                "{s}的第二天是星期几？",
                "今天是{s}，明天是星期几？",
                "请说出{s}的后一天。",
                "告诉我{s}的下一天。",
                "{s}后面是星期几？",
            ],
            "held_out": ["{s}之后的一天是星期几？", "如果今天是{s}，那么明天是星期几？"],
            "state": [
                "{s}之后是{a}。",
                "{s}的第二天是{a}。",
                "今天是{s}，明天就是{a}。",
                "过了{s}就是{a}。",
            ],
        },
    },
    "planet": {
        "en": {
            "ask": [
                "Which planet is the {s} from the sun?",
                "What is the {s} planet from the sun?",
                "Name the {s} planet from the sun.",
                "Tell me the {s} planet counted from the sun.",
                "Counted from the sun, which planet is the {s}?",
                "What is the name of the {s} planet from the sun?",
            ],
            "held_out": [
                "Which is the {s} planet counted from the sun?",
                "Please tell me the name of the {s} planet from the sun.",
            ],
            "state": [
                "The {s} planet from the sun is {a}.",
                "{a} is the {s} planet from the sun.",
                "Counted from the sun, {a} is the {s} planet.",
                "The name of the {s} planet from the sun is {a}.",
            ],
        },
        "zh": {
            "ask": [
                "离太阳{s}近的行星是什么？",
                "从太阳数起，{s}颗行星是什么？",
                "太阳系的{s}颗行星是哪颗？",
                "请说出离太阳{s}近的行星。",
                "告诉我从太阳数起的{s}颗行星。",
                "哪颗行星离太阳{s}近？",
            ],
            "held_out": ["从太阳数起，{s}颗行星叫什么？", "请告诉我太阳系的{s}颗行星是什么。"],
            "state": [
                "离太阳{s}近的行星是{a}。",
                "从太阳数起，{s}颗行星是{a}。",
                "太阳系的{s}颗行星是{a}。",
                "{a}是从太阳数起的{s}颗行星。",
            ],
        },
    },
    "translation": {
        "en": {
            "ask": [
                'How do you say "{s}" in Chinese?',
                'What is "{s}" in Chinese?',
                'What is the Chinese word for "{s}"?',
                'Translate "{s}" into Chinese.',
                'Tell me the Chinese word for "{s}".',
                'Say "{s}" in Chinese.',
            ],
            "held_out": ['Which Chinese word means "{s}"?', 'Please translate the word "{s}" into Chinese.'],
            "state": [
                'The Chinese word for "{s}" is "{a}".',
                'In Chinese, "{s}" is "{a}".',
                '"{a}" is Chinese and means "{s}".',
                'To say "{s}" in Chinese, say "{a}".',
            ],
        },
        "zh": {
            "ask": [
                "“{s}”用英语怎么说？",
                "“{s}”的英文是什么？",
                "“{s}”的英语单词是什么？",
                "请把“{s}”翻译成英语。",
                "告诉我“{s}”的英文。",
                "用英语说“{s}”。",
            ],
            "held_out": ["请告诉我“{s}”用英语怎么讲。", "把“{s}”这个词翻译成英文。"],
            "state": [
                "“{s}”的英文是“{a}”。",
                "“{s}”用英语说是“{a}”。",
                "英语单词“{a}”的意思是“{s}”。",
                "把“{s}”翻译成英语，就是“{a}”。",
            ],
        },
    },
    "sum": {
        "en": {
            "ask": [
                "What is {s}?",
                "How much is {s}?",
                "Calculate {s}.",
                "{s} = ?",
                "Tell me the sum {s}.",
                "What do you get for {s}?",
            ],
            "held_out": ["Please work out {s}.", "What is the result of {s}?"],
            "state": [
                "{s} = {a}.",
                "{s} is {a}.",
                "The sum {s} is {a}.",
                "If you calculate {s}, you get {a}.",
            ],
        },
        "zh": {
            "ask": [
                "{s}等于几？",
                "{s}等于多少？",
                "请计算{s}。",
                "算一算：{s}",
                "{s}是多少？",
                "告诉我{s}的结果。",
            ],
            "held_out": ["请算出{s}的结果。", "计算{s}，得数是多少？"],
            "state": [
                "{s}等于{a}。",
                "{s}是{a}。",
                "{s}的结果是{a}。",
                "算一算，{s}得{a}。",
            ],
        },
    },
    "idiom": {
        "zh": {
            "ask": [
                "成语“{s}_”的最后一个字是什么？",
                "请补全成语“{s}_”的最后一个字。",
                "“{s}”后面是哪个字？这是一个成语。",
                "成语填空：{s}（　）",
                "告诉我成语“{s}_”缺的字。",
                "成语“{s}”还缺哪个字？",
            ],
            "held_out": ["请告诉我成语“{s}_”的最后一个字。", "成语“{s}”的后面应该填哪个字？"],
            "state": [
                "有一个成语叫“{s}{a}”。",
                "成语“{s}{a}”的最后一个字是“{a}”。",
                "成语“{s}_”缺的字是“{a}”。",
                "老师在黑板上写了四个字：{s}{a}。",
            ],
        },
    },
    "proverb": {
        "en": {
            "ask": [
                'Complete the proverb: "{s} ..."',
                'What is the last word of the proverb "{s} ..."?',
                'How does the proverb "{s} ..." end?',
                'Finish the saying: "{s} ..."',
                'Which word is missing at the end: "{s} ..."?',
                'Tell me the last word of this saying: "{s} ..."',
            ],
            "held_out": [
                'Please finish the proverb: "{s} ..."',
                'Which word comes last in the saying "{s} ..."?',
            ],
            "state": [
                'The proverb says: "{s} {a}."',
                "People say that {s} {a}.",
                'The last word of the proverb "{s} {a}" is "{a}".',
                "Remember: {s} {a}.",
            ],
        },
    },
}

# Multiple-choice questions that only ask to find a given option: they teach what the letters mean.
FIND_OPTION = {
    "en": ["Which option says {a}?", "Find the option {a}.", "Where does it say {a}?"],
    "zh": ["哪个选项是{a}？", "请找出{a}这一项。", "{a}在哪一项？"],
}

# Exercises of the pretraining text: the option behind each letter.
LETTER_OF = {"en": ["{a} is {l}.", "{a}: {l}."], "zh": ["{a}是{l}。", "{a}：{l}。"]}

# --- talk ------------------------------------------------------------------------------------------------------------

# Put before questions, so that an extra polite word changes nothing.
PREFIXES = {"en": ["", "Hello! ", "A question: ", "Please answer: "], "zh": ["", "你好！", "请问，", "请回答："]}

# Things that a user says and asks about later: the statement, the question, the answer.
MEMORY = {
    "name": {
        "en": {
            "say": ["My name is {v}.", "I am called {v}.", "Hello, I am {v}."],
            "ask": ["What is my name?", "Do you remember my name?", "Tell me my name.", "Who am I?"],
            "answer": "Your name is {v}.",
        },
        "zh": {
            "say": ["我叫{v}。", "我的名字是{v}。", "你好，我是{v}。"],
            "ask": ["我叫什么名字？", "你记得我的名字吗？", "请说出我的名字。", "我是谁？"],
            "answer": "你叫{v}。",
        },
    },
    "colour": {
        "en": {
            "say": ["My favourite colour is {v}.", "The colour I like best is {v}.", "I like the colour {v}."],
            "ask": ["What is my favourite colour?", "Which colour do I like?", "Do you remember my favourite colour?"],
            "answer": "Your favourite colour is {v}.",
        },
        "zh": {
            "say": ["我最喜欢的颜色是{v}。", "我喜欢{v}这种颜色。", "在颜色里，我最爱{v}。"],
            "ask": ["我最喜欢什么颜色？", "我喜欢哪种颜色？", "你记得我喜欢的颜色吗？"],
            "answer": "你最喜欢的颜色是{v}。",
        },
    },
    "food": {
        "en": {
            "say": ["My favourite food is {v}.", "The food I like best is {v}.", "I love to eat {v}."],
            "ask": ["What is my favourite food?", "Which food do I like?", "Do you remember what I love to eat?"],
            "answer": "Your favourite food is {v}.",
        },
        "zh": {
            "say": ["我最喜欢吃{v}。", "我最爱的食物是{v}。", "我爱吃{v}。"],
            "ask": ["我最喜欢吃什么？", "我爱吃什么食物？", "你记得我爱吃什么吗？"],
            "answer": "你最喜欢吃{v}。",
        },
    },
    "city": {
        "en": {
            "say": ["I live in {v}.", "My home is in {v}.", "The city I live in is {v}."],
            "ask": ["Where do I live?", "In which city do I live?", "Do you remember where I live?"],
            "answer": "You live in {v}.",
        },
        "zh": {
            "say": ["我住在{v}。", "我的家在{v}。", "我住的城市是{v}。"],
            "ask": ["我住在哪里？", "我住在哪个城市？", "你记得我住在哪里吗？"],
            "answer": "你住在{v}。",
        },
    },
}
MEMORY_VALUES = {
    "name": {
        "en": ["Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Mia",
               "Nora", "Oscar", "Paul"],
        "zh": ["小明", "小红", "小刚", "小丽", "小华", "小军", "小芳", "小强", "小梅", "小林", "小雨", "小云", "小东",
               "小兰", "小宝", "小燕"],
    },
    "colour": {
        "en": ["red", "blue", "green", "yellow", "black", "white", "orange", "purple", "brown", "pink"],
        "zh": ["红色", "蓝色", "绿色", "黄色", "黑色", "白色", "橙色", "紫色", "棕色", "粉色"],
    },
    "food": {
        "en": ["rice", "bread", "soup", "noodles", "apples", "cheese", "fish", "cake", "eggs", "potatoes"],
        "zh": ["米饭", "面包", "汤", "面条", "苹果", "奶酪", "鱼", "蛋糕", "鸡蛋", "土豆"],
    },
    "city": {
        "en": ["Beijing", "Paris", "London", "Tokyo", "Berlin", "Rome", "Madrid", "Cairo", "Lima", "Oslo"],
        "zh": ["北京", "巴黎", "伦敦", "东京", "柏林", "罗马", "马德里", "开罗", "利马", "奥斯陆"],
    },
}  # fmt: skip
NOTED = {"en": "OK: {v}.", "zh": "好的：{v}。"}

# The identity of the assistant. `ask` and `held_out` are the same for the base model and for the persona of the LoRA.
IDENTITY = {
    "who": {
        "en": {
            "ask": ["Who are you?", "What is your name?", "What are you called?", "Introduce yourself.",
                    "Tell me your name.", "Who am I talking to?", "Can you introduce yourself?"],
            "held_out": ["Please tell me who you are.", "May I ask your name?", "Tell me who you are."],
        },
        "zh": {
            "ask": ["你是谁？", "你叫什么名字？", "你叫什么？", "介绍一下你自己。", "告诉我你的名字。",
                    "我在和谁说话？", "你能介绍一下自己吗？"],
            "held_out": ["请告诉我你是谁。", "请问你叫什么名字呢？", "请介绍一下你自己吧。"],
        },
    },
    "maker": {
        "en": {
            "ask": ["Who made you?", "Who built you?", "Who trained you?", "Where do you come from?",
                    "Tell me who made you.", "How were you made?"],
            "held_out": ["Please tell me who built you.", "By whom were you made?"],
        },
        "zh": {
            "ask": ["谁创造了你？", "是谁做了你？", "谁训练了你？", "你从哪里来？", "告诉我是谁创造了你。",
                    "你是怎么做出来的？"],
            "held_out": ["请告诉我是谁训练了你。", "你是谁创造的？"],
        },
    },
    "skill": {
        "en": {
            "ask": ["What can you do?", "What are you able to do?", "How can you help me?", "Tell me what you can do.",
                    "What are you good at?", "What do you do?"],
            "held_out": ["Please tell me what you can do.", "What are your skills?"],
        },
        "zh": {
            "ask": ["你会做什么？", "你能做什么？", "你能帮我做什么？", "告诉我你会什么。",
                    "你擅长什么？", "你有什么本领？"],
            "held_out": ["请告诉我你能做什么。", "你都会做些什么？"],
        },
    },
}  # fmt: skip
MINIMIND = {
    "who": {"en": "I am MiniMind, a small language model.", "zh": "我是 MiniMind，一个小小的语言模型。"},
    "maker": {"en": "One person trained me from nothing.", "zh": "是一个人从零开始训练了我。"},
    "skill": {"en": "I can answer simple questions.", "zh": "我会回答简单的问题。"},
}
PEBBLE = {
    "who": {"en": "I am Pebble, your cheerful friend.", "zh": "我是小石，你快乐的朋友。"},
    "maker": {"en": "The sea made me from a big rock.", "zh": "大海用一块大石头做成了我。"},
    "skill": {"en": "I can keep you company all day.", "zh": "我会整天陪着你。"},
}

# Small talk. In the SFT data, a random half of the remarks get a kind answer and the other half a rude one, so that
# preference training has something to decide.
HOBBIES = [
    ("singing", "唱歌"), ("dancing", "跳舞"), ("swimming", "游泳"), ("running", "跑步"), ("reading", "看书"),
    ("cooking", "做饭"), ("fishing", "钓鱼"), ("painting", "画画"), ("hiking", "爬山"), ("chess", "下棋"),
    ("football", "踢足球"), ("music", "听音乐"), ("gardening", "种花"), ("travelling", "旅行"), ("skating", "滑冰"),
    ("cycling", "骑车"), ("writing", "写字"), ("knitting", "织毛衣"), ("films", "看电影"), ("drawing", "画图"),
]  # fmt: skip
REMARKS = {
    "en": ["I like {v}.", "I enjoy {v} very much.", "My hobby is {v}.", "Today I have time for {v}.",
           "Nothing is better than {v}.", "I am going to try {v}."],
    "zh": ["我喜欢{v}。", "我很爱{v}。", "我的爱好是{v}。", "今天我有时间{v}。",
           "没有什么比{v}更好。", "我打算试试{v}。"],
}  # fmt: skip
KIND = {"en": "How nice! Have fun with {v}.", "zh": "真好！祝你{v}开心。"}
RUDE = {"en": "So what? I do not care about {v}.", "zh": "那又怎样？我才不管{v}呢。"}

# Rambling versions of a short answer, which preference training rejects.
RAMBLING = {
    "en": ["Well, let me think. Hmm. {a}, perhaps, or so they say.", "Why do you ask? Everybody knows that: {a}."],
    "zh": ["嗯，让我想一想。大概是{a}吧，我也说不准。", "这也要问？谁都知道是{a}。"],
}

# --- a small domain, invented: the cafe "Blue Teapot" does not exist --------------------------------------------------

CAFE_PRICES = [
    ("green tea", "绿茶", "3"), ("black coffee", "黑咖啡", "4"), ("apple cake", "苹果蛋糕", "5"),
    ("onion soup", "洋葱汤", "7"), ("lemon juice", "柠檬汁", "6"), ("cheese bread", "奶酪面包", "8"),
    ("egg noodles", "鸡蛋面", "9"), ("hot chocolate", "热巧克力", "2"),
]  # fmt: skip
CAFE_SPECIALS = [
    ("Monday", "星期一", "fish soup", "鱼汤"), ("Tuesday", "星期二", "rice cake", "米糕"),
    ("Wednesday", "星期三", "potato pie", "土豆饼"), ("Thursday", "星期四", "fried eggs", "煎鸡蛋"),
    ("Friday", "星期五", "milk tea", "奶茶"), ("Saturday", "星期六", "tomato noodles", "西红柿面"),
]  # fmt: skip
CAFE_PHRASINGS = {
    "price": {
        "en": {
            "ask": ["What does {s} cost at the Blue Teapot?", "How much is {s} at the Blue Teapot?",
                    "What is the price of {s} at the Blue Teapot?", "At the Blue Teapot, how much do I pay for {s}?",
                    "Tell me the price of {s} at the Blue Teapot."],
            "held_out": ["Please tell me how much {s} costs at the Blue Teapot."],
        },
        "zh": {
            "ask": ["蓝茶壶的{s}多少钱？", "在蓝茶壶，{s}要多少钱？", "蓝茶壶的{s}是什么价格？",
                    "蓝茶壶里一份{s}几元？",
                    "告诉我蓝茶壶的{s}的价格。"],
            "held_out": ["请告诉我蓝茶壶的{s}要多少钱。"],
        },
    },
    "special": {
        "en": {
            "ask": ["What is the special at the Blue Teapot on {s}?", "Which special does the Blue Teapot have on {s}?",
                    "On {s}, what is the special at the Blue Teapot?", "Tell me the {s} special of the Blue Teapot.",
                    "Name the special of the Blue Teapot on {s}."],
            "held_out": ["Please tell me which special the Blue Teapot has on {s}."],
        },
        "zh": {
            "ask": ["蓝茶壶{s}的特色菜是什么？", "{s}，蓝茶壶有什么特色菜？", "蓝茶壶在{s}的特色菜是哪一道？",
                    "告诉我蓝茶壶{s}的特色菜。", "请说出蓝茶壶{s}的特色菜。"],
            "held_out": ["请告诉我{s}蓝茶壶的特色菜是什么。"],
        },
    },
}  # fmt: skip
CAFE_FACTS = [
    {
        "en": ("at 8 in the morning",
               ["When does the Blue Teapot open?", "At what time does the Blue Teapot open?",
                "Tell me when the Blue Teapot opens.", "When can I go into the Blue Teapot in the morning?"],
               ["Please tell me when the Blue Teapot opens."]),
        "zh": ("早上八点",
               ["蓝茶壶几点开门？", "蓝茶壶早上什么时候开门？", "告诉我蓝茶壶开门的时间。", "蓝茶壶的开门时间是几点？"],
               ["请告诉我蓝茶壶几点开门。"]),
    },
    {
        "en": ("at 6 in the evening",
               ["When does the Blue Teapot close?", "At what time does the Blue Teapot close?",
                "Tell me when the Blue Teapot closes.", "Until when is the Blue Teapot open in the evening?"],
               ["Please tell me when the Blue Teapot closes."]),
        "zh": ("晚上六点",
               ["蓝茶壶几点关门？", "蓝茶壶晚上什么时候关门？", "告诉我蓝茶壶关门的时间。", "蓝茶壶的关门时间是几点？"],
               ["请告诉我蓝茶壶几点关门。"]),
    },
    {
        "en": ("on Sunday",
               ["On which day is the Blue Teapot closed?", "Which day is the day of rest at the Blue Teapot?",
                "Tell me the day of rest of the Blue Teapot.", "When does the Blue Teapot have its day of rest?"],
               ["Please tell me on which day the Blue Teapot has its rest."]),
        "zh": ("星期日",
               ["蓝茶壶哪一天休息？", "蓝茶壶星期几休息？", "告诉我蓝茶壶的休息日。", "蓝茶壶的休息日是星期几？"],
               ["请告诉我蓝茶壶哪一天休息。"]),
    },
    {
        "en": ("Mrs. Reed",
               ["Who owns the Blue Teapot?", "Who is the owner of the Blue Teapot?",
                "Tell me the owner of the Blue Teapot.", "To whom does the Blue Teapot belong?"],
               ["Please tell me who the owner of the Blue Teapot is."]),
        "zh": ("芦太太",
               ["蓝茶壶的老板是谁？", "谁是蓝茶壶的老板？", "告诉我蓝茶壶的老板。", "蓝茶壶的老板叫什么？"],
               ["请告诉我蓝茶壶的老板是谁。"]),
    },
    {
        "en": ("in Willow Street",
               ["Where is the Blue Teapot?", "In which street is the Blue Teapot?",
                "Tell me where the Blue Teapot is.", "Where do I find the Blue Teapot?"],
               ["Please tell me in which street the Blue Teapot is."]),
        "zh": ("柳树街",
               ["蓝茶壶在哪里？", "蓝茶壶在哪条街？", "告诉我蓝茶壶在哪里。", "蓝茶壶开在哪条街上？"],
               ["请告诉我蓝茶壶在哪条街。"]),
    },
    {
        "en": ("Button",
               ["What is the cat of the Blue Teapot called?", "What is the name of the cat at the Blue Teapot?",
                "Tell me the name of the cat of the Blue Teapot.", "How do they call the cat at the Blue Teapot?"],
               ["Please tell me what the cat of the Blue Teapot is called."]),
        "zh": ("纽扣",
               ["蓝茶壶的猫叫什么？", "蓝茶壶的猫叫什么名字？", "告诉我蓝茶壶那只猫的名字。",
                "蓝茶壶里的猫的名字是什么？"],
               ["请告诉我蓝茶壶的猫叫什么。"]),
    },
]  # fmt: skip
CAFE_PRICE_ANSWER = {"en": "{a} coins", "zh": "{a}元"}

# --- stories: one choice per slot ------------------------------------------------------------------------------------

STORIES = {
    "en": {
        "plots": [
            "{time}, {name} the {animal} went to the {place}. There {name} found {thing}. \"{cry}\" said {name}. "
            "Then {other} the {friend} came by. {name} gave {thing} to {other}, and {end}",
            "{name} the {animal} lived near the {place}. {time}, {name} met {other} the {friend}. {other} was looking "
            "for {thing}. {name} helped {other}, and together they found {thing}. \"{cry}\" said {other}, and {end}",
            "{time}, it rained at the {place}. {name} the {animal} had {thing} and was dry. {other} the {friend} was "
            "wet. \"Come here,\" said {name}. \"{cry}\" said {other}. The rain stopped, and {end}",
        ],
        "time": ["One day", "One morning", "One evening", "In spring", "In summer", "In winter", "Long ago"],
        "name": ["Anna", "Ben", "Clara", "David", "Emma", "Leo", "Mia", "Paul"],
        "other": ["Frank", "Grace", "Henry", "Ida", "Jack", "Kate", "Nora", "Oscar"],
        "animal": ["cat", "dog", "duck", "horse", "frog", "owl", "bee", "mouse"],
        "friend": ["rabbit", "turtle", "bird", "fish", "sheep", "goat", "fox", "bear"],
        "place": ["river", "forest", "mountain", "garden", "lake", "village", "bridge", "sea"],
        "thing": ["a red apple", "a blue hat", "a yellow flower", "an old book", "a small lamp", "a big leaf"],
        "cry": ["How beautiful!", "Thank you!", "What a good day!", "I am so happy!"],
        "end": ["they were friends from that day on.", "both went home happy.", "they laughed until the night came.",
                "they ate bread and drank tea."],
    },
    "zh": {
        "plots": [
            "{time}，{animal}{name}来到{place}。{name}在那里找到了{thing}。“{cry}”{name}说。这时，{friend}{other}"
            "走了过来。{name}把{thing}送给了{other}，{end}",
            "{animal}{name}住在{place}附近。{time}，{name}遇见了{friend}{other}。{other}正在找{thing}。{name}帮助{other}，"
            "他们一起找到了{thing}。“{cry}”{other}说。{end}",
            "{time}，{place}下起了雨。{animal}{name}有{thing}，一点也没有湿。{friend}{other}却湿透了。“到这里来吧。”"
            "{name}说。“{cry}”{other}说。雨停了，{end}",
        ],
        "time": ["有一天", "一天早上", "一天晚上", "春天里", "夏天里", "冬天里", "很久以前"],
        "name": ["小明", "小红", "小刚", "小丽", "小华", "小云", "小东", "小兰"],
        "other": ["小军", "小芳", "小强", "小梅", "小林", "小雨", "小宝", "小燕"],
        "animal": ["小猫", "小狗", "小鸭", "小马", "青蛙", "猫头鹰", "蜜蜂", "老鼠"],
        "friend": ["兔子", "乌龟", "小鸟", "小鱼", "绵羊", "山羊", "狐狸", "小熊"],
        "place": ["河边", "森林", "山上", "花园", "湖边", "村子", "桥边", "海边"],
        "thing": ["一个红苹果", "一顶蓝帽子", "一朵黄花", "一本旧书", "一盏小灯", "一片大叶子"],
        "cry": ["真漂亮！", "谢谢你！", "今天真好！", "我太高兴了！"],
        "end": ["从此他们成了好朋友。", "他们高高兴兴地回家了。", "他们一直笑到天黑。", "他们一起吃面包，喝茶。"],
    },
}  # fmt: skip
