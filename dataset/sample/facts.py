"""True facts about the real world, written by hand as plain tables. `phrasings.py` has the ways to ask and state them.

Every table is a list of rows with English first, then Chinese. A subject stands once in a table, so that every question
has one answer, and the answers are short: an exact match then means something.
"""

from __future__ import annotations

# country, 国家, capital, 首都, continent (a key of CONTINENTS)
COUNTRIES = [
    ("China", "中国", "Beijing", "北京", "Asia"),
    ("Japan", "日本", "Tokyo", "东京", "Asia"),
    ("South Korea", "韩国", "Seoul", "首尔", "Asia"),
    ("India", "印度", "New Delhi", "新德里", "Asia"),
    ("Thailand", "泰国", "Bangkok", "曼谷", "Asia"),
    ("Vietnam", "越南", "Hanoi", "河内", "Asia"),
    ("Mongolia", "蒙古", "Ulaanbaatar", "乌兰巴托", "Asia"),
    ("Iran", "伊朗", "Tehran", "德黑兰", "Asia"),
    ("France", "法国", "Paris", "巴黎", "Europe"),
    ("Germany", "德国", "Berlin", "柏林", "Europe"),
    ("Italy", "意大利", "Rome", "罗马", "Europe"),
    ("Spain", "西班牙", "Madrid", "马德里", "Europe"),
    ("Portugal", "葡萄牙", "Lisbon", "里斯本", "Europe"),
    ("Greece", "希腊", "Athens", "雅典", "Europe"),
    ("Poland", "波兰", "Warsaw", "华沙", "Europe"),
    ("Norway", "挪威", "Oslo", "奥斯陆", "Europe"),
    ("Sweden", "瑞典", "Stockholm", "斯德哥尔摩", "Europe"),
    ("Finland", "芬兰", "Helsinki", "赫尔辛基", "Europe"),
    ("Austria", "奥地利", "Vienna", "维也纳", "Europe"),
    ("Hungary", "匈牙利", "Budapest", "布达佩斯", "Europe"),
    ("Egypt", "埃及", "Cairo", "开罗", "Africa"),
    ("Kenya", "肯尼亚", "Nairobi", "内罗毕", "Africa"),
    ("Nigeria", "尼日利亚", "Abuja", "阿布贾", "Africa"),
    ("Ghana", "加纳", "Accra", "阿克拉", "Africa"),
    ("Morocco", "摩洛哥", "Rabat", "拉巴特", "Africa"),
    ("Senegal", "塞内加尔", "Dakar", "达喀尔", "Africa"),
    ("the United States", "美国", "Washington", "华盛顿", "North America"),
    ("Canada", "加拿大", "Ottawa", "渥太华", "North America"),
    ("Cuba", "古巴", "Havana", "哈瓦那", "North America"),
    ("Brazil", "巴西", "Brasilia", "巴西利亚", "South America"),
    ("Chile", "智利", "Santiago", "圣地亚哥", "South America"),
    ("Peru", "秘鲁", "Lima", "利马", "South America"),
    ("Colombia", "哥伦比亚", "Bogota", "波哥大", "South America"),
    ("Australia", "澳大利亚", "Canberra", "堪培拉", "Oceania"),
    ("New Zealand", "新西兰", "Wellington", "惠灵顿", "Oceania"),
    ("Fiji", "斐济", "Suva", "苏瓦", "Oceania"),
]

CONTINENTS = {
    "Asia": "亚洲",
    "Europe": "欧洲",
    "Africa": "非洲",
    "North America": "北美洲",
    "South America": "南美洲",
    "Oceania": "大洋洲",
}

# element, 元素, symbol
ELEMENTS = [
    ("hydrogen", "氢", "H"),
    ("helium", "氦", "He"),
    ("lithium", "锂", "Li"),
    ("carbon", "碳", "C"),
    ("nitrogen", "氮", "N"),
    ("oxygen", "氧", "O"),
    ("neon", "氖", "Ne"),
    ("sodium", "钠", "Na"),
    ("magnesium", "镁", "Mg"),
    ("aluminium", "铝", "Al"),
    ("silicon", "硅", "Si"),
    ("sulfur", "硫", "S"),
    ("chlorine", "氯", "Cl"),
    ("potassium", "钾", "K"),
    ("calcium", "钙", "Ca"),
    ("iron", "铁", "Fe"),
    ("copper", "铜", "Cu"),
    ("zinc", "锌", "Zn"),
    ("silver", "银", "Ag"),
    ("gold", "金", "Au"),
]

# animal (plural), 动物, class, 类别
ANIMALS = [
    ("dogs", "狗", "mammals", "哺乳动物"),
    ("horses", "马", "mammals", "哺乳动物"),
    ("cows", "牛", "mammals", "哺乳动物"),
    ("whales", "鲸", "mammals", "哺乳动物"),
    ("bats", "蝙蝠", "mammals", "哺乳动物"),
    ("eagles", "老鹰", "birds", "鸟类"),
    ("penguins", "企鹅", "birds", "鸟类"),
    ("ducks", "鸭子", "birds", "鸟类"),
    ("owls", "猫头鹰", "birds", "鸟类"),
    ("sharks", "鲨鱼", "fish", "鱼类"),
    ("carp", "鲤鱼", "fish", "鱼类"),
    ("goldfish", "金鱼", "fish", "鱼类"),
    ("ants", "蚂蚁", "insects", "昆虫"),
    ("bees", "蜜蜂", "insects", "昆虫"),
    ("butterflies", "蝴蝶", "insects", "昆虫"),
    ("mosquitoes", "蚊子", "insects", "昆虫"),
    ("snakes", "蛇", "reptiles", "爬行动物"),
    ("turtles", "乌龟", "reptiles", "爬行动物"),
    ("crocodiles", "鳄鱼", "reptiles", "爬行动物"),
    ("frogs", "青蛙", "amphibians", "两栖动物"),
]

# word, opposite, 词, 反义词
OPPOSITES = [
    ("big", "small", "大", "小"),
    ("hot", "cold", "热", "冷"),
    ("high", "low", "高", "低"),
    ("long", "short", "长", "短"),
    ("fast", "slow", "快", "慢"),
    ("new", "old", "新", "旧"),
    ("many", "few", "多", "少"),
    ("left", "right", "左", "右"),
    ("up", "down", "上", "下"),
    ("black", "white", "黑", "白"),
    ("early", "late", "早", "晚"),
    ("open", "closed", "开", "关"),
    ("true", "false", "真", "假"),
    ("dry", "wet", "干", "湿"),
    ("light", "heavy", "轻", "重"),
    ("strong", "weak", "强", "弱"),
    ("far", "near", "远", "近"),
    ("happy", "sad", "快乐", "悲伤"),
    ("rich", "poor", "富", "穷"),
    ("day", "night", "白天", "黑夜"),
]

# thing, 东西, colour, 颜色
COLOURS = [
    ("grass", "草", "green", "绿色"),
    ("snow", "雪", "white", "白色"),
    ("coal", "煤", "black", "黑色"),
    ("blood", "血", "red", "红色"),
    ("a ripe banana", "熟香蕉", "yellow", "黄色"),
    ("a clear sky", "晴朗的天空", "blue", "蓝色"),
    ("a carrot", "胡萝卜", "orange", "橙色"),
    ("milk", "牛奶", "white", "白色"),
    ("a ripe tomato", "熟西红柿", "red", "红色"),
    ("chocolate", "巧克力", "brown", "棕色"),
    ("a crow", "乌鸦", "black", "黑色"),
    ("a lemon", "柠檬", "yellow", "黄色"),
    ("an eggplant", "茄子", "purple", "紫色"),
    ("spinach", "菠菜", "green", "绿色"),
]

MONTHS = [
    ("January", "一月"),
    ("February", "二月"),
    ("March", "三月"),
    ("April", "四月"),
    ("May", "五月"),
    ("June", "六月"),
    ("July", "七月"),
    ("August", "八月"),
    ("September", "九月"),
    ("October", "十月"),
    ("November", "十一月"),
    ("December", "十二月"),
]

# Seasons of the months in the Northern Hemisphere, three months each from March on.
SEASONS = [("spring", "春天"), ("summer", "夏天"), ("autumn", "秋天"), ("winter", "冬天")]

DAYS = [
    ("Monday", "星期一"),
    ("Tuesday", "星期二"),
    ("Wednesday", "星期三"),
    ("Thursday", "星期四"),
    ("Friday", "星期五"),
    ("Saturday", "星期六"),
    ("Sunday", "星期日"),
]

# The planets in their order from the sun.
ORDINALS = [
    ("first", "第一"),
    ("second", "第二"),
    ("third", "第三"),
    ("fourth", "第四"),
    ("fifth", "第五"),
    ("sixth", "第六"),
    ("seventh", "第七"),
    ("eighth", "第八"),
]
PLANETS = [
    ("Mercury", "水星"),
    ("Venus", "金星"),
    ("Earth", "地球"),
    ("Mars", "火星"),
    ("Jupiter", "木星"),
    ("Saturn", "土星"),
    ("Uranus", "天王星"),
    ("Neptune", "海王星"),
]

# word, 词
WORDS = [
    ("apple", "苹果"),
    ("water", "水"),
    ("book", "书"),
    ("moon", "月亮"),
    ("sun", "太阳"),
    ("tree", "树"),
    ("flower", "花"),
    ("fire", "火"),
    ("mountain", "山"),
    ("river", "河"),
    ("teacher", "老师"),
    ("friend", "朋友"),
    ("house", "房子"),
    ("door", "门"),
    ("bread", "面包"),
    ("rice", "米饭"),
    ("tea", "茶"),
    ("bird", "鸟"),
    ("cat", "猫"),
    ("rain", "雨"),
]

# The beginning of a Chinese idiom, and its last character.
IDIOMS = [
    ("画蛇添", "足"),
    ("守株待", "兔"),
    ("亡羊补", "牢"),
    ("对牛弹", "琴"),
    ("井底之", "蛙"),
    ("狐假虎", "威"),
    ("一石二", "鸟"),
    ("马到成", "功"),
    ("鸡犬不", "宁"),
    ("叶公好", "龙"),
    ("杯弓蛇", "影"),
    ("刻舟求", "剑"),
    ("掩耳盗", "铃"),
    ("水滴石", "穿"),
    ("胸有成", "竹"),
    ("愚公移", "山"),
]

# The beginning of an English proverb, and its last word.
PROVERBS = [
    ("the early bird catches the", "worm"),
    ("actions speak louder than", "words"),
    ("better late than", "never"),
    ("practice makes", "perfect"),
    ("no pain, no", "gain"),
    ("time is", "money"),
    ("look before you", "leap"),
    ("honesty is the best", "policy"),
    ("two heads are better than", "one"),
    ("easy come, easy", "go"),
    ("all that glitters is not", "gold"),
    ("knowledge is", "power"),
    ("the pen is mightier than the", "sword"),
    ("when in Rome, do as the Romans", "do"),
    ("slow and steady wins the", "race"),
    ("haste makes", "waste"),
]

LARGEST_SUMMAND = 8  # sums of a and b with 1 <= a <= b <= 8
