//! Which language a caller speaks.
//!
//! Callers speak in short sentences ("Where is my order?"), and speech recognition writes them without punctuation and
//! often without accents. Statistics over letter sequences, which is how language detectors usually work, need more text
//! than that. So evidence of several kinds is added up: the script, letters that only some languages have, the frequent
//! words listed in the phrase book, and, from three words on, what `whatlang` says. Where the sum decides nothing, older
//! utterances join it, and then the system prompt.

use std::{collections::HashMap, fmt, ops::Range, sync::LazyLock};

use whatlang::{Detector, Lang};

use super::filler;

/// The codes in the order that breaks ties: where two languages cannot be told apart, the one with more callers comes first.
const CODES: [&str; 70] = [
    "en", "es", "fr", "de", "it", "pt", "nl", "ca", "hi", "bn", "ta", "te", "mr", "gu", "kn", "ml", "pa", "or", "ur",
    "pl", "ru", "uk", "be", "cs", "sk", "ro", "hu", "bg", "hr", "sr", "sl", "mk", "sq", "et", "lv", "lt", "sv", "no",
    "da", "fi", "is", "el", "tr", "ar", "he", "fa", "ku", "zh-Hans", "zh-Hant", "ja", "ko", "mn", "vi", "th", "id",
    "ms", "fil", "my", "km", "lo", "ne", "si", "kk", "uz", "sw", "am", "af", "yo", "ha", "zu",
];

/// A language of the phrase book.
///
/// Always one that the book has, so looking up its phrases cannot fail.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Language(u8);

// === impl Language ===

impl Language {
    /// English, which is spoken when nothing says otherwise.
    pub const ENGLISH: Language = Language(0);

    /// Every language of the book.
    pub fn all() -> impl Iterator<Item = Language> {
        (0..CODES.len() as u8).map(Language)
    }

    /// The code under which the book keeps the language: ISO 639-1 where there is one, with the script for Chinese.
    pub fn code(self) -> &'static str {
        CODES[self.index()]
    }

    /// The English name.
    pub fn name(self) -> &'static str {
        &filler::entry(self).name
    }

    /// The language's name for itself.
    pub fn native_name(self) -> &'static str {
        &filler::entry(self).native
    }

    /// Reads a language tag such as `en`, `pt_BR` or `zh-TW` (BCP 47, in any case, with `-` or `_`). Regions are ignored,
    /// except that they choose the script of Chinese.
    pub fn from_code(code: &str) -> Option<Language> {
        let code = code.to_ascii_lowercase();
        let mut subtags = code.split(['-', '_']);
        let primary = match subtags.next()? {
            "zh" | "cmn" if subtags.any(|tag| matches!(tag, "hant" | "tw" | "hk" | "mo")) => "zh-hant",
            "zh" | "cmn" => "zh-hans",
            "yue" => "zh-hant",
            "nb" | "nn" => "no",
            "tl" => "fil",
            "iw" => "he",
            "in" => "id",
            "ckb" | "kmr" => "ku",
            other => other,
        };
        Self::all().find(|language| language.code().eq_ignore_ascii_case(primary))
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Debug for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Language({})", self.code())
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// Utterances older than this say little about the language now, and would cost time in a long conversation.
const MAX_UTTERANCES: usize = 12;

/// Bounds the work on a long utterance; its end is what the caller said last.
const MAX_UTTERANCE_BYTES: usize = 600;

/// Bounds the work on a long system prompt; who the agent is and how it speaks stands at its start.
const MAX_PROMPT_BYTES: usize = 2_000;

/// The language to speak to the caller in.
///
/// `user_words` are the caller's utterances, oldest first. The last one decides. If it is too short or could be several
/// languages, earlier ones are heard too. What is still open then, the system prompt settles: first by naming a language
/// ("Speak only German", "日本語で"), then by the language that it is written in. Without any of that it is English.
pub fn detect<'a>(user_words: impl DoubleEndedIterator<Item = &'a str>, system_prompt: Option<&str>) -> Language {
    let mut heard = Scores::NONE;
    for utterance in user_words.rev().take(MAX_UTTERANCES) {
        heard.add(&evidence(tail(utterance, MAX_UTTERANCE_BYTES)));
        if let Some(language) = heard.clear_winner() {
            return language;
        }
    }

    let candidates = heard.candidates();
    let fits = |language: &Language| candidates.is_empty() || candidates.contains(language);
    let asked_for = system_prompt.and_then(|prompt| requested(prompt, fits));
    let written_in = || {
        let written = evidence(head(system_prompt?, MAX_PROMPT_BYTES));
        written.candidates().into_iter().find(fits)
    };
    asked_for
        .or_else(written_in)
        .or_else(|| candidates.first().copied())
        .or_else(|| heard.best_guess())
        .unwrap_or(Language::ENGLISH)
}

fn head(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
    &text[..end.unwrap_or_default()]
}

fn tail(text: &str, bytes: usize) -> &str {
    let start = (text.len().saturating_sub(bytes)..text.len()).find(|&start| text.is_char_boundary(start));
    &text[start.unwrap_or_default()..]
}

// === Evidence ===

/// Below this the evidence is no more than a name or a loan word could give.
const ENOUGH: f32 = 0.9;

/// The most that a Latin word of a few bytes is worth when it stands alone, because names and exclamations are such words.
const GUESS: f32 = 0.8;
const SHORT_WORD: usize = 3;

/// Below this it is not even a guess.
const HARDLY_ANY: f32 = 0.61;

/// How far the best language must be ahead of the second, as a difference and as a share of its own score.
const LEAD: f32 = 0.2;
const LEAD_SHARE: f32 = 0.06;

/// What decides at once: as much as a handful of words that no other language has.
const DECISIVE: f32 = 5.0;

/// All Latin letters together count for less than one word, because foreign names have them too.
const LETTERS_AT_MOST: f32 = 0.8;

/// The evidence for each language, by its index.
struct Scores([f32; CODES.len()]);

impl Scores {
    const NONE: Scores = Scores([0.0; CODES.len()]);

    fn give(&mut self, language: Language, weight: f32) {
        self.0[language.index()] += weight;
    }

    fn give_all(&mut self, shares: &[(Language, f32)], factor: f32) {
        for &(language, weight) in shares {
            self.give(language, weight * factor);
        }
    }

    fn add(&mut self, other: &Scores) {
        for (sum, weight) in self.0.iter_mut().zip(other.0) {
            *sum += weight;
        }
    }

    fn capped(mut self, limit: f32) -> Scores {
        for weight in &mut self.0 {
            *weight = weight.min(limit);
        }
        self
    }

    fn best(&self) -> f32 {
        self.0.iter().copied().fold(0.0, f32::max)
    }

    /// The likeliest language where there is not enough evidence, but nothing better to go by either.
    fn best_guess(&self) -> Option<Language> {
        self.leaders(HARDLY_ANY).first().copied()
    }

    fn clear_winner(&self) -> Option<Language> {
        match self.candidates()[..] {
            [only] => Some(only),
            _ => None,
        }
    }

    /// The languages that the evidence leaves open, best first; none if there is not enough of it.
    fn candidates(&self) -> Vec<Language> {
        self.leaders(ENOUGH)
    }

    fn leaders(&self, enough: f32) -> Vec<Language> {
        let best = self.best();
        if best < enough {
            return Vec::new();
        }
        let lead = LEAD.max(best * LEAD_SHARE);
        let mut open: Vec<_> = Language::all().filter(|language| self.0[language.index()] > best - lead).collect();
        open.sort_by(|a, b| self.0[b.index()].total_cmp(&self.0[a.index()]));
        open
    }
}

fn evidence(text: &str) -> Scores {
    match main_script(text) {
        Some(Script::One(code)) => {
            let mut scores = Scores::NONE;
            scores.give(known(code), DECISIVE);
            scores
        }
        Some(Script::Han) => han(text),
        Some(Script::Many(letters)) => {
            let words = tokens(text);
            let mut scores = by_script(letters);
            scores.add(&by_letters(text, letters));
            scores.add(&by_words(&words));
            scores.add(&by_statistics(text, &words));
            match &words[..] {
                [word] if letters == Letters::Latin && word.len() <= SHORT_WORD => scores.capped(GUESS),
                _ => scores,
            }
        }
        None => Scores::NONE,
    }
}

// === Scripts ===

#[derive(Clone, Copy)]
enum Script {
    /// Only one language of the book is written in it.
    One(&'static str),
    /// Chinese characters, with or without kana.
    Han,
    /// Several languages share it; the letters that tell them apart.
    Many(Letters),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Letters {
    Latin,
    Cyrillic,
    Arabic,
    Devanagari,
}

/// The script of most of the text. A letter outside Latin counts more than a Latin one, because names of products and
/// English words stand in every script, and a Chinese character or Korean syllable is worth several letters.
fn main_script(text: &str) -> Option<Script> {
    const CLASSES: usize = 32;
    let mut found: [(u32, Option<Script>); CLASSES] = [(0, None); CLASSES];
    for c in text.chars() {
        if let Some((class, weight, script)) = script_of(c) {
            found[class].0 += weight;
            found[class].1 = Some(script);
        }
    }
    found.into_iter().max_by_key(|(weight, _)| *weight)?.1
}

/// A number for the script of a letter, the letter's weight, and the script.
fn script_of(c: char) -> Option<(usize, u32, Script)> {
    if c.is_ascii_alphabetic() {
        return Some((0, 1, Script::Many(Letters::Latin)));
    }
    if c.is_ascii() || !(c.is_alphabetic() || is_mark(c)) {
        return None;
    }
    let one = |class, weight, code| Some((class, weight, Script::One(code)));
    match u32::from(c) {
        0x00C0..=0x02FF | 0x1E00..=0x1EFF => Some((0, 1, Script::Many(Letters::Latin))),
        0x0370..=0x03FF | 0x1F00..=0x1FFF => one(1, 2, "el"),
        0x0400..=0x052F => Some((2, 2, Script::Many(Letters::Cyrillic))),
        0x0590..=0x05FF => one(3, 2, "he"),
        0x0600..=0x06FF | 0x0750..=0x077F | 0xFB50..=0xFDFF | 0xFE70..=0xFEFF => {
            Some((4, 2, Script::Many(Letters::Arabic)))
        }
        0x0900..=0x097F => Some((5, 2, Script::Many(Letters::Devanagari))),
        0x0980..=0x09FF => one(6, 2, "bn"),
        0x0A00..=0x0A7F => one(7, 2, "pa"),
        0x0A80..=0x0AFF => one(8, 2, "gu"),
        0x0B00..=0x0B7F => one(9, 2, "or"),
        0x0B80..=0x0BFF => one(10, 2, "ta"),
        0x0C00..=0x0C7F => one(11, 2, "te"),
        0x0C80..=0x0CFF => one(12, 2, "kn"),
        0x0D00..=0x0D7F => one(13, 2, "ml"),
        0x0D80..=0x0DFF => one(14, 2, "si"),
        0x0E00..=0x0E7F => one(15, 2, "th"),
        0x0E80..=0x0EFF => one(16, 2, "lo"),
        0x1000..=0x109F | 0xAA60..=0xAA7F => one(17, 2, "my"),
        0x1200..=0x139F => one(18, 2, "am"),
        0x1780..=0x17FF => one(19, 2, "km"),
        0x1800..=0x18AF => one(20, 2, "mn"),
        0x1100..=0x11FF | 0x3130..=0x318F | 0xAC00..=0xD7AF => one(21, 4, "ko"),
        0x3040..=0x30FF
        | 0x31F0..=0x31FF
        | 0xFF66..=0xFF9F
        | 0x3400..=0x4DBF
        | 0x4E00..=0x9FFF
        | 0xF900..=0xFAFF
        | 0x20000..=0x323AF => Some((22, 4, Script::Han)),
        _ => None,
    }
}

/// Characters that only simplified Chinese writes, among those that are frequent in speech.
const SIMPLIFIED: &str = "这个们时说会请问吗么东车长门间开关电话订单对谢还没给让谁几号机张现发后过进边远题应该让认识气乐买卖钱账户费\
    为什办实预约诊医药价严丝习书亲从仓众优传伤体儿兰兴养册军农冲况减击划则刚创别务动劳势华协卫历压县参双变听员响团园围国图圆\
    场坏块坚处备复头夹奋奖妇妈学宁宝审宽宾导岁币师带帮帐库废张归录总恶恋惊惯愿战户扫报护担换损据摄断无旧显术权条来极构枪标样\
    检楼欢汇汉济测浅滚满灯点炼热爱状独环电疗盘码确离种积称稳穷签简粮纸级线练组细终经结络统继续绩维网职联肠脑脚节范荐药营规视\
    觉触警计订记讲许论设访证评词试详语误读课调谈负财责败货质贵费贸赔转轮软轻载较输达运远违连迟选递邮释里鉴钟错键锁镇闭闻队阳阶际\
    陆险随难静顶项顺须领频颜额风飞饭饮饿馆验骑高鸡麻齐";

/// Characters that only traditional Chinese writes. Japanese shares many of them, but rarely a whole sentence.
const TRADITIONAL: &str = "這個們時說會請問嗎麼東車長門間開關電話訂單對謝還沒給讓誰幾號機張現發後過進邊遠題應該認識氣樂買賣錢賬戶費\
    為辦實預約診醫藥價嚴絲習書親從倉眾優傳傷體兒蘭興養冊軍農衝況減擊劃則剛創別務動勞勢華協衛歷壓縣參雙變聽員響團園圍國圖圓\
    場壞塊堅處備複頭夾奮獎婦媽學寧寶審寬賓導歲幣師帶幫帳庫廢歸錄總惡戀驚慣願戰掃報護擔換損據攝斷無舊顯術權條來極構槍標樣\
    檢樓歡匯漢濟測淺滾滿燈點煉熱愛狀獨環療盤碼確離種積稱穩窮簽簡糧紙級線練組細終經結絡統繼續績維網職聯腸腦腳節範薦營規視\
    覺觸計記講許論設訪證評詞試詳語誤讀課調談負財責敗貨質貴貿賠轉輪軟輕載較輸達運違連遲選遞郵釋裡鑑鐘錯鍵鎖鎮閉聞隊陽階際\
    陸險隨難靜頂項順須領頻顏額風飛飯飲餓館驗騎雞麥齊您嘅咗唔啲喺佢";

/// Characters in the form that only Japanese writes, for the rare utterance without kana.
const JAPANESE: &str =
    "変円駅売読転験様応発実広価児単帰気対沢図経続総関権検労覚観営厳団塩拠歩毎渋焼竜粋繊聴譲豊鉄録働込畑峠";

fn han(text: &str) -> Scores {
    // Kana are Japanese alone; the sound mark and the middle dot also stand in Chinese text.
    let kana = |c: char| matches!(u32::from(c), 0x3041..=0x3096 | 0x30A1..=0x30FA | 0xFF66..=0xFF9D);
    let has = |set: &str, c: char| set.contains(c);
    let (mut simplified, mut traditional, mut japanese) = (0.0, 0.0, 0.0);
    for c in text.chars() {
        if kana(c) {
            japanese += DECISIVE;
        }
        // A character in both lists is the same in both scripts.
        match (has(SIMPLIFIED, c), has(TRADITIONAL, c)) {
            (true, false) => simplified += 0.5,
            (false, true) => traditional += 0.5,
            _ => {}
        }
        if has(JAPANESE, c) && !has(SIMPLIFIED, c) && !has(TRADITIONAL, c) {
            japanese += 2.0;
        }
    }
    let mut scores = Scores::NONE;
    scores.give(known("zh-Hans"), 1.0 + simplified);
    scores.give(known("zh-Hant"), 1.0 + traditional);
    scores.give(known("ja"), japanese);
    scores
}

fn known(code: &str) -> Language {
    Language::from_code(code).expect("the code stands in CODES")
}

// === Letters ===

/// Letters, in lower case, with the languages that they speak for and how strongly. A letter counts once, however often
/// it comes.
const LATIN_LETTERS: &[(&str, &str)] = &[
    ("ß", "de 0.8"),
    ("ñ", "es 0.7 fil 0.2"),
    ("¿¡", "es 0.8"),
    ("ã", "pt 0.7 vi 0.3"),
    ("õ", "pt 0.4 et 0.4 vi 0.3"),
    ("ç", "fr 0.3 pt 0.3 tr 0.3 ca 0.2 sq 0.3 ku 0.3"),
    ("œ", "fr 0.7"),
    ("èù", "fr 0.3 it 0.3 vi 0.1 yo 0.1 ca 0.1"),
    ("àò", "it 0.2 fr 0.2 ca 0.2 vi 0.1 yo 0.1"),
    ("ê", "fr 0.3 pt 0.3 vi 0.3 ku 0.3 af 0.2"),
    ("îû", "fr 0.2 ku 0.4"),
    ("ï", "fr 0.1 ca 0.2 nl 0.1"),
    ("ë", "sq 0.4 nl 0.2 af 0.2 fr 0.1"),
    ("áíóú", "es 0.2 pt 0.2 cs 0.2 sk 0.2 hu 0.2 is 0.2 vi 0.1 ca 0.1"),
    ("é", "fr 0.2 es 0.2 pt 0.2 cs 0.1 sk 0.1 hu 0.2 is 0.1 nl 0.1 ca 0.1"),
    ("ý", "cs 0.3 sk 0.3 is 0.3"),
    ("łńśźż", "pl 0.7"),
    ("ąę", "pl 0.4 lt 0.4"),
    ("ć", "pl 0.3 hr 0.3 sr 0.2"),
    ("řěů", "cs 0.7"),
    ("ľĺŕ", "sk 0.8"),
    ("ťď", "sk 0.4 cs 0.3"),
    ("ň", "cs 0.4 sk 0.3"),
    ("ô", "sk 0.3 fr 0.2 vi 0.3 pt 0.1 af 0.1"),
    ("őű", "hu 0.8"),
    ("ășțţ", "ro 0.7"),
    ("â", "ro 0.3 vi 0.2 fr 0.1 pt 0.1 tr 0.1"),
    ("đ", "hr 0.4 vi 0.4 sr 0.3"),
    ("č", "cs 0.2 sk 0.2 sl 0.3 hr 0.2 lt 0.2 lv 0.2 sr 0.1"),
    ("šž", "cs 0.2 sk 0.2 sl 0.2 hr 0.2 lt 0.2 lv 0.2 et 0.1 sr 0.1"),
    ("āēīķļņģ", "lv 0.7"),
    ("ū", "lv 0.4 lt 0.4"),
    ("ėįų", "lt 0.7"),
    ("å", "sv 0.4 no 0.4 da 0.4"),
    ("ø", "no 0.4 da 0.4"),
    ("æ", "da 0.4 no 0.3 is 0.3"),
    ("ðþ", "is 0.8"),
    ("ä", "de 0.3 sv 0.3 fi 0.3 et 0.3 sk 0.1"),
    ("ö", "de 0.2 sv 0.3 fi 0.3 et 0.1 hu 0.2 tr 0.2 is 0.2"),
    ("ü", "de 0.3 et 0.2 hu 0.2 tr 0.3 es 0.1 ca 0.1"),
    ("ğı", "tr 0.8"),
    ("ş", "tr 0.5 ku 0.4"),
    ("ơưạảấầẩẫậắằẳẵặẻẽếềểễệỉĩịỏốồổỗộớờởỡợủũụứừửữựỳỷỹỵ", "vi 0.8"),
    ("ẹọ", "yo 0.5 vi 0.3"),
    ("ṣ", "yo 0.8"),
    ("ɓɗƙƴ", "ha 0.8"),
    ("ʻ", "uz 0.8"),
];

const CYRILLIC_LETTERS: &[(&str, &str)] = &[
    ("і", "uk 0.5 be 0.5 kk 0.4"),
    ("їєґ", "uk 0.8"),
    ("ў", "be 0.8 uz 0.4"),
    ("ыэ", "ru 0.4 be 0.3 kk 0.2 mn 0.3"),
    ("ё", "ru 0.3 be 0.3 mn 0.2"),
    ("ъ", "bg 0.6 ru 0.2"),
    ("щ", "bg 0.2 ru 0.3 uk 0.3"),
    ("ђћ", "sr 0.8"),
    ("џљњј", "sr 0.5 mk 0.5"),
    ("ѓќѕѐѝ", "mk 0.8"),
    ("әұңһ", "kk 0.8"),
    ("ғқ", "kk 0.6 uz 0.4"),
    ("ҳ", "uz 0.8"),
    ("өү", "mn 0.7 kk 0.5"),
];

const ARABIC_LETTERS: &[(&str, &str)] = &[
    ("ةى", "ar 0.7"),
    ("يكأإ", "ar 0.5"),
    ("پچژگ", "fa 0.4 ur 0.3 ku 0.3"),
    ("یک", "fa 0.3 ur 0.2 ku 0.2"),
    ("ٹڈڑںےہھ", "ur 0.8"),
    ("ڕڵێۆڤە", "ku 0.8"),
];

const DEVANAGARI_LETTERS: &[(&str, &str)] = &[("ळऱॲ", "mr 0.7"), ("ँ", "hi 0.2 ne 0.2")];

type Shares = Vec<(Language, f32)>;

static LETTERS: LazyLock<HashMap<char, Shares>> = LazyLock::new(|| {
    let mut letters = HashMap::new();
    for (chars, shares) in [LATIN_LETTERS, CYRILLIC_LETTERS, ARABIC_LETTERS, DEVANAGARI_LETTERS].into_iter().flatten() {
        let fields: Vec<_> = shares.split(' ').collect();
        let shares: Shares = fields
            .chunks_exact(2)
            .map(|pair| (known(pair[0]), pair[1].parse().expect("a number follows every code")))
            .collect();
        letters.extend(chars.chars().map(|c| (c, shares.clone())));
    }
    letters
});

/// What the script alone says. Only Latin letters can come from a caller of any language; who speaks a word in another
/// script speaks one of its languages, so the evidence is enough from the start, and the rest only chooses among them.
fn by_script(script: Letters) -> Scores {
    let codes: &[&str] = match script {
        Letters::Latin => &[],
        Letters::Cyrillic => &["ru", "uk", "be", "bg", "sr", "mk", "mn", "kk"],
        Letters::Arabic => &["ar", "fa", "ur"],
        Letters::Devanagari => &["hi", "mr", "ne"],
    };
    let mut scores = Scores::NONE;
    for code in codes {
        scores.give(known(code), ENOUGH);
    }
    // Most texts without any of its neighbours' letters are Arabic, though it comes late in the order that breaks ties.
    if script == Letters::Arabic {
        scores.give(known("ar"), LEAD / 4.0);
    }
    scores
}

/// What a letter says against the languages of its script that do not have it. Nothing in Latin script, where speech
/// recognition keeps the accents of foreign names.
const FOREIGN_LETTER: f32 = 0.4;

fn by_letters(text: &str, script: Letters) -> Scores {
    let mut scores = Scores::NONE;
    let mut seen: Vec<char> = Vec::new();
    for c in text.chars().filter(|c| !c.is_ascii()).flat_map(char::to_lowercase) {
        if seen.contains(&c) {
            continue;
        }
        seen.push(c);
        if let Some(shares) = LETTERS.get(&c) {
            scores.give_all(shares, 1.0);
            if matches!(script, Letters::Cyrillic | Letters::Arabic) {
                for language in Language::all().filter(|language| !shares.iter().any(|(having, _)| having == language))
                {
                    scores.give(language, -FOREIGN_LETTER);
                }
            }
        }
    }
    // The Arabic article stands on every second noun, and no neighbour has it.
    if script == Letters::Arabic
        && text.split_whitespace().any(|word| word.starts_with("ال") && word.chars().count() > 4)
    {
        scores.give(known("ar"), 0.5);
    }
    if script == Letters::Latin { scores.capped(LETTERS_AT_MOST) } else { scores }
}

// === Frequent words ===

/// The frequent words of all languages, each with what it says for which language.
struct Lexicon {
    words: HashMap<String, Shares>,
    /// Beginnings of words.
    stems: HashMap<String, Shares>,
}

/// What a word without its accents is worth, against 1 for a word as listed.
const WITHOUT_ACCENTS: f32 = 0.6;

/// How much less a word says the more languages have it: with two of them each still gets two thirds.
const RARITY: f32 = 0.6;

static LEXICON: LazyLock<Lexicon> = LazyLock::new(|| {
    let mut words: HashMap<String, Shares> = HashMap::new();
    let mut stems: HashMap<String, Shares> = HashMap::new();
    for language in Language::all() {
        for listed in filler::entry(language).words.split_whitespace() {
            let (listed, map) = match listed.strip_suffix('*') {
                Some(stem) => (stem, &mut stems),
                None => (listed, &mut words),
            };
            for exact in tokens(listed) {
                // Short words lose their identity with their accents, and more so where most words have some.
                let bare = fold(&exact);
                let least = if matches!(language.code(), "vi" | "yo") { 5 } else { 3 };
                if bare != exact && bare.chars().count() >= least {
                    share(map.entry(bare).or_default(), language, WITHOUT_ACCENTS);
                }
                share(map.entry(exact).or_default(), language, 1.0);
            }
        }
    }
    for shares in words.values_mut().chain(stems.values_mut()) {
        let sharers: f32 = shares.iter().map(|(_, weight)| weight).sum();
        for (_, weight) in shares {
            *weight *= sharers.max(1.0).powf(-RARITY);
        }
    }
    Lexicon { words, stems }
});

fn share(shares: &mut Shares, language: Language, weight: f32) {
    match shares.iter_mut().find(|(sharer, _)| *sharer == language) {
        Some((_, given)) => *given = given.max(weight),
        None => shares.push((language, weight)),
    }
}

fn by_words(words: &[String]) -> Scores {
    let mut scores = Scores::NONE;
    for word in words {
        // Single letters are as often initials or spelling.
        let factor = if word.chars().nth(1).is_none() { 0.5 } else { 1.0 };
        if let Some(shares) = LEXICON.words.get(word) {
            scores.give_all(shares, factor);
            continue;
        }
        let Some(shortest) = word.char_indices().map(|(start, _)| start).chain([word.len()]).nth(3) else {
            continue;
        };
        let mut stems = (shortest..=word.len()).rev().filter_map(|end| word.get(..end));
        if let Some(shares) = stems.find_map(|stem| LEXICON.stems.get(stem)) {
            scores.give_all(shares, factor);
        }
    }
    scores
}

// === Statistics ===

static DETECTOR: LazyLock<Detector> =
    LazyLock::new(|| Detector::with_allowlist(Language::all().filter_map(whatlang_code).collect()));

fn whatlang_code(language: Language) -> Option<Lang> {
    Some(match language.code() {
        "en" => Lang::Eng,
        "es" => Lang::Spa,
        "fr" => Lang::Fra,
        "de" => Lang::Deu,
        "it" => Lang::Ita,
        "pt" => Lang::Por,
        "nl" => Lang::Nld,
        "ca" => Lang::Cat,
        "hi" => Lang::Hin,
        "mr" => Lang::Mar,
        "ne" => Lang::Nep,
        "ur" => Lang::Urd,
        "pl" => Lang::Pol,
        "ru" => Lang::Rus,
        "uk" => Lang::Ukr,
        "be" => Lang::Bel,
        "cs" => Lang::Ces,
        "sk" => Lang::Slk,
        "ro" => Lang::Ron,
        "hu" => Lang::Hun,
        "bg" => Lang::Bul,
        "hr" => Lang::Hrv,
        "sr" => Lang::Srp,
        "sl" => Lang::Slv,
        "mk" => Lang::Mkd,
        "et" => Lang::Est,
        "lv" => Lang::Lav,
        "lt" => Lang::Lit,
        "sv" => Lang::Swe,
        "no" => Lang::Nob,
        "da" => Lang::Dan,
        "fi" => Lang::Fin,
        "tr" => Lang::Tur,
        "ar" => Lang::Ara,
        "fa" => Lang::Pes,
        "vi" => Lang::Vie,
        "id" => Lang::Ind,
        "fil" => Lang::Tgl,
        "uz" => Lang::Uzb,
        "af" => Lang::Afr,
        "zu" => Lang::Zul,
        // Written in a script of their own, or not known to whatlang.
        _ => return None,
    })
}

/// Fewer words than this, and whatlang guesses; from the second number on, more do not make it surer.
const WORDS_FOR_STATISTICS: usize = 3;
const WORDS_FOR_GOOD_STATISTICS: usize = 7;

/// What whatlang's verdict counts for each word. Even on a long and clear sentence it stays a little below `ENOUGH`: it
/// needs a letter or a word beside it, since of names and numbers it makes some language too.
const STATISTICS_PER_WORD: f32 = 0.12;

/// Languages so alike that statistics on a sentence hardly part them, or of which whatlang knows only the first. The other
/// gets a share of what is found for one.
const TWINS: [(&str, &str, f32); 5] =
    [("id", "ms", 1.0), ("no", "da", 0.9), ("cs", "sk", 0.5), ("nl", "af", 0.8), ("hr", "sl", 0.5)];

fn by_statistics(text: &str, words: &[String]) -> Scores {
    let mut scores = Scores::NONE;
    let count = words.iter().filter(|word| !word.is_empty()).count();
    if count < WORDS_FOR_STATISTICS {
        return scores;
    }
    if let Some(info) = DETECTOR.detect(text)
        && let Some(language) = Language::all().find(|language| whatlang_code(*language) == Some(info.lang()))
    {
        let sureness = (1.0 + info.confidence() as f32) / 2.0;
        let weight = STATISTICS_PER_WORD * sureness * count.min(WORDS_FOR_GOOD_STATISTICS) as f32;
        scores.give(language, weight);
        for (one, other, part) in TWINS {
            if language.code() == one {
                scores.give(known(other), weight * part);
            } else if language.code() == other {
                scores.give(known(one), weight * part);
            }
        }
    }
    scores
}

// === What the system prompt asks for ===

/// Wordings that ask for a language outright.
static HINTS: LazyLock<Patterns<Language>> = LazyLock::new(|| {
    Patterns::new(
        Language::all()
            .flat_map(|language| filler::entry(language).hint.iter().map(move |hint| (hint.as_str(), language))),
    )
});

/// English names of languages, which are hints only beside a word about speaking: "in Thai restaurants" asks for nothing.
static NAMES: LazyLock<Patterns<Language>> = LazyLock::new(|| {
    Patterns::new(Language::all().flat_map(|language| {
        let entry = filler::entry(language);
        entry.also_called.iter().chain([&entry.name]).map(move |name| (name.as_str(), language))
    }))
});

const SPEAKING: [&str; 12] = [
    "speak",
    "spoke",
    "respon",
    "reply",
    "replies",
    "answer",
    "talk",
    "communicat",
    "convers",
    "language",
    "say",
    "greet",
];
const BEFORE_NAME: [&str; 14] = [
    "in", "speak", "speaks", "speaking", "only", "use", "fluent", "native", "natural", "perfect", "polite", "formal",
    "spoken", "is",
];
const NEGATIONS: [&str; 5] = ["not", "never", "t", "avoid", "without"];

/// The first language that the prompt asks for and that `fits`.
fn requested(prompt: &str, fits: impl Fn(&Language) -> bool) -> Option<Language> {
    let tokens = folded_tokens(prompt);
    let hint =
        HINTS.find(&tokens).map(|(found, language)| (found.start, language)).find(|(_, language)| fits(language));
    let name = NAMES
        .find(&tokens)
        .filter(|(found, _)| is_asked_for(&tokens, found.clone()))
        .map(|(found, language)| (found.start, language))
        .find(|(_, language)| fits(language));
    hint.into_iter().chain(name).min_by_key(|(position, _)| *position).map(|(_, language)| language)
}

fn is_asked_for(tokens: &[String], name: Range<usize>) -> bool {
    let sentence_start = tokens[..name.start].iter().rposition(|token| token.is_empty()).map_or(0, |end| end + 1);
    let before = &tokens[sentence_start.max(name.start.saturating_sub(6))..name.start];
    let previous = before.last().map_or("", String::as_str);
    let next = tokens.get(name.end).map_or("", String::as_str);
    if before.iter().rev().take(4).any(|token| NEGATIONS.contains(&token.as_str())) {
        return false;
    }
    let about_speaking = before.iter().any(|token| SPEAKING.iter().any(|stem| token.starts_with(stem)));
    previous == "language" || matches!(next, "only" | "speaking") || (about_speaking && BEFORE_NAME.contains(&previous))
}

// === Words and patterns ===

/// Cuts a text into words in lower case. An empty string stands where a sentence ends. In scripts without spaces between
/// words, every character is a word.
fn tokens(text: &str) -> Vec<String> {
    cut(text, |c, word| word.extend(c.to_lowercase().filter(|&c| c != DOT_ABOVE)))
}

/// As `tokens`, with accents removed and spelling variants made one, so that a prompt is understood either way.
fn folded_tokens(text: &str) -> Vec<String> {
    cut(text, |c, word| c.to_lowercase().for_each(|c| push_folded(c, word)))
}

fn fold(word: &str) -> String {
    let mut folded = String::with_capacity(word.len());
    word.chars().for_each(|c| push_folded(c, &mut folded));
    folded
}

/// What the Turkish capital İ leaves behind in lower case.
const DOT_ABOVE: char = '\u{307}';

fn cut(text: &str, push: impl Fn(char, &mut String)) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut word = String::new();
    for c in text.chars() {
        if is_silent(c) {
            continue;
        }
        let alone = is_unspaced(c);
        if !word.is_empty() && (alone || !is_word(c)) {
            tokens.push(std::mem::take(&mut word));
        }
        if is_word(c) {
            push(c, &mut word);
        } else if is_sentence_end(c) {
            tokens.push(String::new());
        }
        if alone && !word.is_empty() {
            tokens.push(std::mem::take(&mut word));
        }
    }
    if !word.is_empty() {
        tokens.push(word);
    }
    tokens
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || is_mark(c)
}

/// Accents and vowel signs that Rust does not count as alphanumeric.
fn is_mark(c: char) -> bool {
    matches!(u32::from(c),
        0x0300..=0x036F | 0x0591..=0x05BD | 0x05BF..=0x05C7 | 0x064B..=0x0652 | 0x0670
        | 0x0900..=0x0903 | 0x093A..=0x094F | 0x0951..=0x0957 | 0x0962..=0x0963 | 0x0981..=0x0983 | 0x09BC..=0x09D7
        | 0x0A01..=0x0A03 | 0x0A3C..=0x0A51 | 0x0A70..=0x0A71 | 0x0A81..=0x0A83 | 0x0ABC..=0x0ACD
        | 0x0B01..=0x0B03 | 0x0B3C..=0x0B57 | 0x0B82 | 0x0BBE..=0x0BCD | 0x0C00..=0x0C04 | 0x0C3C..=0x0C56
        | 0x0C81..=0x0C83 | 0x0CBC..=0x0CD6 | 0x0D00..=0x0D03 | 0x0D3B..=0x0D57 | 0x0D81..=0x0D83 | 0x0DCA..=0x0DF3
        | 0x0E31..=0x0E4E | 0x0EB1..=0x0ECE | 0x102B..=0x103E | 0x1056..=0x109D | 0x17B4..=0x17D3 | 0x17DD)
}

/// Letters of the scripts that are written without spaces between words.
fn is_unspaced(c: char) -> bool {
    matches!(u32::from(c),
        0x0E01..=0x0E4E | 0x0E80..=0x0EFF | 0x1000..=0x1049 | 0x1050..=0x109F | 0x1780..=0x17D3 | 0x17DC..=0x17DD
        | 0x3041..=0x309F | 0x30A1..=0x30FA | 0x30FC..=0x30FF | 0x31F0..=0x31FF | 0x3400..=0x4DBF | 0x4E00..=0x9FFF
        | 0xAA60..=0xAA7F | 0xF900..=0xFAFF | 0xFF66..=0xFF9F | 0x20000..=0x323AF)
}

/// Joiners and the Arabic stretching mark, which writers put in or leave out, and Arabic and Hebrew vowel points.
fn is_silent(c: char) -> bool {
    matches!(c, '\u{200B}'..='\u{200F}' | '\u{FEFF}' | '\u{00AD}' | '\u{0640}' | '\u{064B}'..='\u{0652}' | '\u{0670}')
        || matches!(c, '\u{0591}'..='\u{05BD}' | '\u{05BF}' | '\u{05C1}'..='\u{05C2}' | '\u{05C4}'..='\u{05C5}' | '\u{05C7}')
}

/// Full stops of all scripts: besides the European ones Chinese, Indic, Arabic, Urdu, Ethiopic, Burmese and Khmer.
fn is_sentence_end(c: char) -> bool {
    matches!(c, '.' | '!' | '?' | ';' | '。' | '！' | '？' | '；' | '।' | '॥')
        || matches!(c, '\u{061F}' | '\u{061B}' | '\u{06D4}' | '\u{1362}' | '\u{104B}' | '\u{17D4}')
}

/// Letters with accents, and spelling variants of a letter, beside what they are matched as.
const FOLDS: &[(&str, &str)] = &[
    ("àáâãäåāăąǎạảấầẩẫậắằẳẵặ", "a"),
    ("æ", "ae"),
    ("çćčĉċ", "c"),
    ("ďđðɗ", "d"),
    ("èéêëēĕėęěẹẻẽếềểễệ", "e"),
    ("ğģĝġ", "g"),
    ("ħ", "h"),
    ("ìíîïīĭįıǐịỉĩ", "i"),
    ("ķƙ", "k"),
    ("łľĺļ", "l"),
    ("ñńňņǹ", "n"),
    ("òóôõöøōŏőǒọỏốồổỗộơớờởỡợ", "o"),
    ("œ", "oe"),
    ("řŕ", "r"),
    ("śšşșṣŝ", "s"),
    ("ß", "ss"),
    ("ťţțŧ", "t"),
    ("ùúûüūŭůűųǔụủũưứừửữự", "u"),
    ("ýÿỳỵỷỹƴ", "y"),
    ("źžż", "z"),
    ("þ", "th"),
    ("ɓ", "b"),
    ("ά", "α"),
    ("έ", "ε"),
    ("ή", "η"),
    ("ίϊΐ", "ι"),
    ("ό", "ο"),
    ("ύϋΰ", "υ"),
    ("ώ", "ω"),
    ("ς", "σ"),
    ("ёѐ", "е"),
    ("ѝ", "и"),
    ("أإآٱ", "ا"),
    ("يى", "ی"),
    ("ك", "ک"),
    // Indic letters with and without the dot that marks foreign sounds.
    ("\u{0958}", "क"),
    ("\u{0959}", "ख"),
    ("\u{095A}", "ग"),
    ("\u{095B}", "ज"),
    ("\u{095C}", "ड"),
    ("\u{095D}", "ढ"),
    ("\u{095E}", "फ"),
    ("\u{0929}", "न"),
    ("\u{09DC}", "ড"),
    ("\u{09DD}", "ঢ"),
    ("\u{09DF}", "য"),
    ("\u{0A33}", "ਲ"),
    ("\u{0A36}", "ਸ"),
    ("\u{0A59}", "ਖ"),
    ("\u{0A5A}", "ਗ"),
    ("\u{0A5B}", "ਜ"),
    ("\u{0A5E}", "ਫ"),
    ("\u{0B5C}", "ଡ"),
    ("\u{0B5D}", "ଢ"),
    // Written apart from their letter: accents, the dot of foreign sounds, and the apostrophe letters of Uzbek.
    ("\u{093C}\u{09BC}\u{0A3C}\u{0ABC}\u{0B3C}\u{0CBC}ʻʼ", ""),
];

static FOLDED: LazyLock<HashMap<char, &'static str>> =
    LazyLock::new(|| FOLDS.iter().flat_map(|(from, to)| from.chars().map(move |c| (c, *to))).collect());

fn push_folded(c: char, word: &mut String) {
    if c.is_ascii() {
        word.push(c);
    } else if !matches!(c, '\u{0300}'..='\u{036F}') {
        match FOLDED.get(&c) {
            Some(to) => word.push_str(to),
            None => word.push(c),
        }
    }
}

/// A set of wordings as the phrase book writes them, each with what it means.
pub(super) struct Patterns<T> {
    patterns: Vec<(Vec<Part>, T)>,
    /// The patterns by the first two characters of their first word, so that few are tried at each word of a text.
    by_start: HashMap<Start, Vec<usize>>,
}

type Start = (char, Option<char>);

enum Part {
    /// Exactly this word.
    Word(String),
    /// A word that begins so.
    Stem(String),
    /// A few words of the same sentence.
    Gap,
}

/// How much a gap may span: six words, or fifteen characters of a script without spaces.
const GAP: usize = 30;
const GAP_WORD: usize = 5;
const GAP_CHARACTER: usize = 2;

impl<T: Copy> Patterns<T> {
    pub(super) fn new<'a>(wordings: impl Iterator<Item = (&'a str, T)>) -> Patterns<T> {
        let mut set = Patterns { patterns: Vec::new(), by_start: HashMap::new() };
        for (wording, meaning) in wordings {
            let parts = parse(wording);
            if let Some(Part::Word(first) | Part::Stem(first)) = parts.first() {
                set.by_start.entry(start(first)).or_default().push(set.patterns.len());
                set.patterns.push((parts, meaning));
            }
        }
        set
    }

    /// Whether the text has one of the wordings.
    pub(super) fn is_in(&self, text: &str) -> bool {
        self.find(&folded_tokens(text)).next().is_some()
    }

    /// Where the wordings stand among `tokens`, in order, and what they mean.
    fn find(&self, tokens: &[String]) -> impl Iterator<Item = (Range<usize>, T)> {
        tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()).flat_map(move |(position, token)| {
            let candidates = self.by_start.get(&start(token)).map_or(&[][..], Vec::as_slice);
            candidates.iter().filter_map(move |&index| {
                let (parts, meaning) = &self.patterns[index];
                Some((position..match_from(parts, tokens, position)?, *meaning))
            })
        })
    }
}

fn start(word: &str) -> Start {
    let mut chars = word.chars();
    (chars.next().unwrap_or_default(), chars.next())
}

fn parse(wording: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    for (index, stretch) in wording.split('…').enumerate() {
        if index > 0 {
            parts.push(Part::Gap);
        }
        for chunk in stretch.split_whitespace() {
            parts.extend(folded_tokens(chunk).into_iter().map(Part::Word));
            if chunk.ends_with('*')
                && let Some(Part::Word(stem)) = parts.pop()
            {
                parts.push(Part::Stem(stem));
            }
        }
    }
    parts
}

/// Where the match ends that begins at `position`.
fn match_from(parts: &[Part], tokens: &[String], position: usize) -> Option<usize> {
    let Some((part, rest)) = parts.split_first() else {
        return Some(position);
    };
    let token = tokens.get(position)?;
    match part {
        Part::Word(word) => (token == word).then(|| match_from(rest, tokens, position + 1))?,
        Part::Stem(stem) => token.starts_with(stem.as_str()).then(|| match_from(rest, tokens, position + 1))?,
        Part::Gap => {
            let mut room = GAP;
            for (next, token) in tokens.iter().enumerate().skip(position) {
                if let Some(end) = match_from(rest, tokens, next) {
                    return Some(end);
                }
                let width = if token.chars().all(is_unspaced) { GAP_CHARACTER } else { GAP_WORD };
                room = room.checked_sub(width)?;
                if token.is_empty() {
                    return None;
                }
            }
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn said(words: &str) -> &'static str {
        detect([words].into_iter(), None).code()
    }

    /// Utterances as speech recognition writes them, at least four a language.
    const UTTERANCES: &[(&str, &[&str])] = &[
        (
            "en",
            &[
                "Where is my order?",
                "i'd like to change my appointment",
                "can you tell me when you open tomorrow",
                "yes please",
                "my package hasn't arrived yet",
                "what's the weather like in Boston",
                "i lost my credit card",
                "do you have a table for two tonight",
                "the internet has been down since yesterday",
                "sorry who am i speaking with",
            ],
        ),
        (
            "es",
            &[
                "¿Dónde está mi pedido?",
                "quiero cambiar mi cita",
                "cuanto cuesta el envio",
                "buenas tardes",
                "no me ha llegado el paquete",
                "podria hablar con alguien por favor",
                "se me ha perdido la tarjeta",
                "tienen mesa para dos esta noche",
                "desde ayer no me funciona internet",
                "con quién hablo",
            ],
        ),
        (
            "fr",
            &[
                "Je voudrais savoir où est ma commande",
                "est-ce que vous êtes ouverts demain",
                "j'ai besoin d'annuler mon rendez-vous",
                "bonjour madame",
                "ca coute combien",
                "je n'ai pas recu ma facture",
                "j'ai perdu ma carte bancaire",
                "avez-vous une table pour deux ce soir",
                "internet ne marche plus depuis hier",
                "à qui ai-je l'honneur",
            ],
        ),
        (
            "de",
            &[
                "Wo ist meine Bestellung?",
                "ich möchte einen Termin vereinbaren",
                "wann haben sie morgen geoffnet",
                "guten tag",
                "mein paket ist noch nicht da",
                "können Sie mir bitte weiterhelfen",
                "ich habe meine karte verloren",
                "haben sie heute abend noch einen tisch frei",
                "seit gestern geht mein internet nicht",
                "mit wem spreche ich",
            ],
        ),
        (
            "it",
            &[
                "dov'è il mio ordine",
                "vorrei spostare il mio appuntamento",
                "quanto costa la spedizione",
                "buongiorno",
                "non ho ancora ricevuto il pacco",
                "a che ora aprite domani",
                "ho perso la mia carta",
                "avete un tavolo per due stasera",
                "da ieri non funziona internet",
                "con chi parlo",
            ],
        ),
        (
            "pt",
            &[
                "Onde está o meu pedido?",
                "eu queria remarcar a minha consulta",
                "quanto custa o frete",
                "boa tarde",
                "nao recebi a encomenda ainda",
                "você pode me ajudar com a fatura",
                "perdi o meu cartão",
                "tem mesa para dois hoje à noite",
                "desde ontem a internet não funciona",
                "com quem eu falo",
            ],
        ),
        (
            "nl",
            &[
                "Waar is mijn bestelling?",
                "ik wil graag een afspraak maken",
                "hoe laat gaan jullie morgen open",
                "goedemorgen",
                "mijn pakje is nog niet geleverd",
                "kunt u mij helpen met de rekening",
                "ik ben mijn pas kwijt",
                "heeft u vanavond nog een tafel voor twee",
                "sinds gisteren doet mijn internet het niet",
                "met wie spreek ik",
            ],
        ),
        (
            "ca",
            &[
                "On és la meva comanda?",
                "voldria canviar la cita de demà",
                "a quina hora obriu",
                "bon dia",
                "encara no he rebut el paquet",
                "he perdut la targeta",
                "teniu taula per a dos aquesta nit",
                "des d'ahir no em funciona internet",
                "amb qui parlo",
            ],
        ),
        (
            "hi",
            &[
                "मेरा ऑर्डर कहाँ है",
                "मुझे अपॉइंटमेंट बदलना है",
                "आप कल कितने बजे खोलते हैं",
                "मेरा पार्सल अभी तक नहीं आया",
                "mera order kahan hai",
                "मेरा कार्ड खो गया है",
                "कल से इंटरनेट नहीं चल रहा",
            ],
        ),
        ("bn", &["আমার অর্ডার কোথায়", "আমি অ্যাপয়েন্টমেন্ট বদলাতে চাই", "আপনারা কাল কখন খুলবেন", "হ্যাঁ ঠিক আছে"]),
        ("ta", &["என் ஆர்டர் எங்கே இருக்கிறது", "நான் நேரத்தை மாற்ற வேண்டும்", "நாளை எத்தனை மணிக்கு திறப்பீர்கள்", "ஆமாம்"]),
        ("te", &["నా ఆర్డర్ ఎక్కడ ఉంది", "నాకు అపాయింట్‌మెంట్ మార్చాలి", "రేపు ఎన్ని గంటలకు తెరుస్తారు", "అవును"]),
        (
            "mr",
            &[
                "माझी ऑर्डर कुठे आहे",
                "मला अपॉइंटमेंट बदलायची आहे",
                "तुम्ही उद्या किती वाजता उघडता",
                "माझं पार्सल अजून आलं नाही",
                "माझं कार्ड हरवलं आहे",
                "कालपासून इंटरनेट बंद आहे",
            ],
        ),
        ("gu", &["મારો ઓર્ડર ક્યાં છે", "મારે અપોઇન્ટમેન્ટ બદલવી છે", "તમે કાલે કેટલા વાગ્યે ખોલો છો", "હા બરાબર"]),
        ("kn", &["ನನ್ನ ಆರ್ಡರ್ ಎಲ್ಲಿದೆ", "ನಾನು ಸಮಯ ಬದಲಾಯಿಸಬೇಕು", "ನಾಳೆ ಎಷ್ಟು ಗಂಟೆಗೆ ತೆರೆಯುತ್ತೀರಿ", "ಹೌದು"]),
        ("ml", &["എന്റെ ഓർഡർ എവിടെയാണ്", "എനിക്ക് അപ്പോയിന്റ്മെന്റ് മാറ്റണം", "നാളെ എത്ര മണിക്ക് തുറക്കും", "അതെ"]),
        ("pa", &["ਮੇਰਾ ਆਰਡਰ ਕਿੱਥੇ ਹੈ", "ਮੈਂ ਸਮਾਂ ਬਦਲਣਾ ਚਾਹੁੰਦਾ ਹਾਂ", "ਤੁਸੀਂ ਕੱਲ੍ਹ ਕਿੰਨੇ ਵਜੇ ਖੋਲ੍ਹਦੇ ਹੋ", "ਹਾਂ ਜੀ"]),
        ("or", &["ମୋ ଅର୍ଡର କେଉଁଠି ଅଛି", "ମୁଁ ସମୟ ବଦଳାଇବାକୁ ଚାହେଁ", "ଆପଣ କାଲି କେତେବେଳେ ଖୋଲିବେ", "ହଁ"]),
        (
            "ur",
            &[
                "میرا آرڈر کہاں ہے",
                "مجھے اپائنٹمنٹ تبدیل کرنی ہے",
                "آپ کل کتنے بجے کھولتے ہیں",
                "جی ہاں شکریہ",
                "میرا کارڈ گم ہو گیا ہے",
                "کل سے انٹرنیٹ نہیں چل رہا",
            ],
        ),
        (
            "pl",
            &[
                "Gdzie jest moje zamówienie?",
                "chciałbym przełożyć wizytę",
                "o której jutro otwieracie",
                "dzień dobry",
                "moja paczka jeszcze nie dotarła",
                "zgubiłam kartę",
                "czy jest wolny stolik na dziś wieczór",
                "od wczoraj nie działa mi internet",
                "z kim rozmawiam",
            ],
        ),
        (
            "ru",
            &[
                "Где мой заказ?",
                "я хочу перенести запись",
                "во сколько вы завтра открываетесь",
                "добрый день",
                "посылка до сих пор не пришла",
                "я потеряла карту",
                "есть ли столик на двоих на сегодня",
                "со вчерашнего дня не работает интернет",
                "с кем я разговариваю",
            ],
        ),
        (
            "uk",
            &[
                "Де моє замовлення?",
                "я хочу перенести запис",
                "о котрій ви завтра відчиняєтеся",
                "добрий день",
                "посилка досі не прийшла",
                "я загубила картку",
                "чи є столик на двох на сьогодні",
                "з учора не працює інтернет",
                "з ким я розмовляю",
            ],
        ),
        (
            "be",
            &[
                "Дзе мая замова?",
                "я хачу перанесці запіс",
                "а якой гадзіне вы заўтра адчыняецеся",
                "добры дзень",
                "пасылка яшчэ не прыйшла",
                "я згубіла картку",
                "ці ёсць столік на дваіх на сёння",
                "з учорашняга дня не працуе інтэрнэт",
                "з кім я размаўляю",
            ],
        ),
        (
            "cs",
            &[
                "kde je moje objednávka",
                "chtěl bych změnit termín schůzky",
                "v kolik zítra otevíráte",
                "dobrý den",
                "balík mi ještě nepřišel",
                "ztratila jsem kartu",
                "máte na dnes večer volný stůl",
                "od včerejška mi nefunguje internet",
                "s kým mluvím",
            ],
        ),
        (
            "sk",
            &[
                "kde je moja objednávka",
                "chcel by som zmeniť termín",
                "o koľkej zajtra otvárate",
                "dobrý deň",
                "balík mi ešte neprišiel",
                "stratila som kartu",
                "máte na dnes večer voľný stôl",
                "od včera mi nefunguje internet",
                "s kým hovorím",
            ],
        ),
        (
            "ro",
            &[
                "Unde este comanda mea?",
                "aș vrea să schimb programarea",
                "la ce oră deschideți mâine",
                "bună ziua",
                "nu am primit inca pachetul",
                "mi-am pierdut cardul",
                "aveți o masă pentru două persoane diseară",
                "de ieri nu îmi merge internetul",
                "cu cine vorbesc",
            ],
        ),
        (
            "hu",
            &[
                "Hol van a rendelésem?",
                "szeretném módosítani az időpontomat",
                "mikor nyitnak ki holnap",
                "jó napot kívánok",
                "még nem érkezett meg a csomagom",
                "elvesztettem a kártyámat",
                "van szabad asztaluk ma estére",
                "tegnap óta nem működik az internet",
                "kivel beszélek",
            ],
        ),
        (
            "bg",
            &[
                "Къде е поръчката ми?",
                "искам да преместя часа си",
                "в колко часа отваряте утре",
                "добър ден",
                "пратката още не е пристигнала",
                "загубих си картата",
                "имате ли маса за двама за тази вечер",
                "от вчера не ми работи интернетът",
                "с кого говоря",
            ],
        ),
        (
            "hr",
            &[
                "Gdje je moja narudžba?",
                "htio bih promijeniti termin",
                "u koliko sati sutra otvarate",
                "paket mi još nije stigao",
                "što mogu učiniti",
                "izgubila sam karticu",
                "imate li stol za dvoje večeras",
                "od jučer mi ne radi internet",
                "s kim razgovaram",
            ],
        ),
        (
            "sr",
            &[
                "Где је моја поруџбина?",
                "хтео бих да променим термин",
                "у колико сати сутра отварате",
                "пакет ми још није стигао",
                "gde je moja porudžbina",
                "изгубила сам картицу",
                "имате ли сто за двоје вечерас",
                "од јуче ми не ради интернет",
                "с ким разговарам",
            ],
        ),
        (
            "sl",
            &[
                "Kje je moje naročilo?",
                "rad bi prestavil termin",
                "ob kateri uri jutri odprete",
                "dober dan",
                "paket še ni prispel",
                "izgubila sem kartico",
                "imate nocoj prosto mizo za dva",
                "od včeraj mi ne dela internet",
                "s kom govorim",
            ],
        ),
        (
            "mk",
            &[
                "Каде е мојата нарачка?",
                "сакам да го променам терминот",
                "во колку часот отворате утре",
                "добар ден, ми треба помош",
                "пакетот уште не пристигна",
                "ја загубив картичката",
                "имате ли маса за двајца вечерва",
                "од вчера не ми работи интернетот",
                "со кого зборувам",
            ],
        ),
        (
            "sq",
            &[
                "Ku është porosia ime?",
                "dua të ndryshoj takimin",
                "në çfarë ore hapeni nesër",
                "mirëdita",
                "pakoja ende nuk ka ardhur",
                "kam humbur kartën",
                "a keni tavolinë për dy sonte",
                "që nga dje nuk më punon interneti",
                "me kë po flas",
            ],
        ),
        (
            "et",
            &[
                "Kus mu tellimus on?",
                "ma tahaksin aega muuta",
                "mis kell te homme avate",
                "tere päevast",
                "pakk ei ole veel kohale jõudnud",
                "kaotasin oma kaardi ära",
                "kas teil on täna õhtuks vaba lauda",
                "alates eilsest ei tööta mul internet",
                "kellega ma räägin",
            ],
        ),
        (
            "lv",
            &[
                "Kur ir mans pasūtījums?",
                "es gribētu pārcelt vizīti",
                "cikos jūs rīt atverat",
                "labdien",
                "paka vēl nav pienākusi",
                "es pazaudēju savu karti",
                "vai jums ir brīvs galdiņš šovakar",
                "kopš vakardienas man nedarbojas internets",
                "ar ko es runāju",
            ],
        ),
        (
            "lt",
            &[
                "Kur yra mano užsakymas?",
                "norėčiau perkelti vizitą",
                "kelintą valandą rytoj atidarote",
                "laba diena",
                "siuntinys dar neatvyko",
                "pamečiau kortelę",
                "ar turite laisvą staliuką šiam vakarui",
                "nuo vakar neveikia internetas",
                "su kuo aš kalbu",
            ],
        ),
        (
            "sv",
            &[
                "Var är min beställning?",
                "jag skulle vilja boka om min tid",
                "när öppnar ni imorgon",
                "tack så mycket",
                "paketet har inte kommit än",
                "jag har tappat bort mitt kort",
                "har ni ett bord för två ikväll",
                "internet har inte fungerat sedan igår",
                "vem pratar jag med",
            ],
        ),
        (
            "no",
            &[
                "Hvor er bestillingen min?",
                "jeg vil gjerne endre timen min",
                "når åpner dere i morgen",
                "pakken har ikke kommet ennå",
                "kan du hjelpe meg med noe",
                "jeg har mistet kortet mitt",
                "har dere et bord til to i kveld",
                "internett har ikke virket siden i går",
                "hvem snakker jeg med",
            ],
        ),
        (
            "da",
            &[
                "Hvor er min bestilling henne?",
                "jeg vil gerne ændre min tid",
                "hvornår åbner I i morgen",
                "pakken er ikke kommet endnu",
                "kan du hjælpe mig med noget",
                "jeg har mistet mit kort",
                "har I et bord til to i aften",
                "internettet har ikke virket siden i går",
                "hvem taler jeg med",
            ],
        ),
        (
            "fi",
            &[
                "Missä tilaukseni on?",
                "haluaisin siirtää aikani",
                "mihin aikaan avaatte huomenna",
                "hyvää päivää",
                "paketti ei ole vielä tullut",
                "olen kadottanut korttini",
                "onko teillä pöytää kahdelle täksi illaksi",
                "netti ei ole toiminut eilisestä lähtien",
                "kenen kanssa puhun",
            ],
        ),
        (
            "is",
            &[
                "Hvar er pöntunin mín?",
                "mig langar að breyta tímanum mínum",
                "hvenær opnið þið á morgun",
                "góðan daginn",
                "pakkinn er ekki kominn enn",
                "ég týndi kortinu mínu",
                "eigið þið borð fyrir tvo í kvöld",
                "netið hefur ekki virkað síðan í gær",
                "við hvern tala ég",
            ],
        ),
        (
            "el",
            &[
                "Πού είναι η παραγγελία μου;",
                "θέλω να αλλάξω το ραντεβού μου",
                "τι ώρα ανοίγετε αύριο",
                "ναι ευχαριστώ",
            ],
        ),
        (
            "tr",
            &[
                "Siparişim nerede?",
                "randevumu değiştirmek istiyorum",
                "yarın saat kaçta açıyorsunuz",
                "iyi günler",
                "kargom daha gelmedi",
                "kartımı kaybettim",
                "bu akşam iki kişilik masanız var mı",
                "dünden beri internetim çalışmıyor",
                "kiminle görüşüyorum",
            ],
        ),
        (
            "ar",
            &[
                "أين طلبي",
                "أريد تغيير موعدي",
                "متى تفتحون غداً",
                "لم يصل الطرد بعد",
                "مرحبا كيف حالك",
                "فقدت بطاقتي",
                "هل عندكم طاولة لشخصين الليلة",
                "الإنترنت لا يعمل منذ أمس",
            ],
        ),
        ("he", &["איפה ההזמנה שלי", "אני רוצה לשנות את התור", "מתי אתם פותחים מחר", "כן תודה"]),
        (
            "fa",
            &[
                "سفارش من کجاست",
                "می‌خواهم وقتم را عوض کنم",
                "فردا ساعت چند باز می‌کنید",
                "بسته هنوز نرسیده است",
                "سلام خسته نباشید",
                "کارتم را گم کرده‌ام",
                "برای امشب میز دو نفره دارید",
                "از دیروز اینترنتم قطع است",
            ],
        ),
        (
            "ku",
            &[
                "Siparîşa min li ku ye?",
                "ez dixwazim hevdîtina xwe biguherînim",
                "hûn sibê saet çend vedikin",
                "pakêta min hîn nehatiye",
                "داواکارییەکەم لە کوێیە",
                "min karta xwe winda kir",
                "ji bo îşev maseya du kesan heye",
                "ji duh ve înterneta min naxebite",
                "ez bi kê re dipeyivim",
            ],
        ),
        ("zh-Hans", &["我的订单在哪里", "我想改一下预约时间", "你们明天几点开门", "包裹还没有到"]),
        ("zh-Hant", &["我的訂單在哪裡", "我想改一下預約時間", "你們明天幾點開門", "包裹還沒有到"]),
        (
            "ja",
            &[
                "注文はどこですか",
                "予約を変更したいのですが",
                "明日は何時に開きますか",
                "荷物がまだ届きません",
                "予約変更",
            ],
        ),
        ("ko", &["제 주문 어디쯤 왔어요", "예약을 변경하고 싶은데요", "내일 몇 시에 문 여나요", "네"]),
        (
            "mn",
            &[
                "Миний захиалга хаана байна?",
                "би цагаа өөрчлөх гэсэн юм",
                "маргааш хэдэн цагт нээх вэ",
                "илгээмж ирээгүй байна",
                "би картаа гээчихлээ",
                "өнөө орой хоёр хүний ширээ бий юу",
                "өчигдрөөс хойш интернэт ажиллахгүй байна",
                "би хэнтэй ярьж байна",
            ],
        ),
        (
            "vi",
            &[
                "Đơn hàng của tôi ở đâu?",
                "tôi muốn đổi lịch hẹn",
                "ngày mai mấy giờ mở cửa",
                "xin chào",
                "gói hàng vẫn chưa tới",
                "tôi bị mất thẻ",
                "tối nay còn bàn cho hai người không",
                "mạng của tôi hỏng từ hôm qua",
                "tôi đang nói chuyện với ai",
            ],
        ),
        ("th", &["ออเดอร์ของฉันอยู่ที่ไหน", "อยากเปลี่ยนเวลานัด", "พรุ่งนี้เปิดกี่โมง", "ใช่ค่ะ"]),
        (
            "id",
            &[
                "Pesanan saya di mana?",
                "saya mau ubah jadwal janji temu",
                "besok buka jam berapa",
                "paket saya belum sampai juga",
                "bisa bantu saya nggak",
                "kartu saya hilang",
                "apakah ada meja untuk dua orang malam ini",
                "internet saya mati sejak kemarin",
                "saya bicara dengan siapa",
            ],
        ),
        (
            "ms",
            &[
                "Di mana pesanan saya? Saya nak semak status",
                "saya nak tukar tarikh temujanji",
                "esok buka pukul berapa",
                "bungkusan saya belum sampai lagi",
                "boleh tolong saya tak",
                "kad saya hilang",
                "ada meja kosong untuk dua orang malam ini tak",
                "internet saya tak jalan sejak semalam",
                "saya bercakap dengan siapa",
            ],
        ),
        (
            "fil",
            &[
                "Nasaan na po ang order ko?",
                "gusto ko pong palitan ang appointment ko",
                "anong oras kayo magbubukas bukas",
                "hindi pa dumarating ang pakete",
                "magandang umaga po",
                "nawala po ang card ko",
                "may mesa pa ba kayo para sa dalawa mamayang gabi",
                "wala kaming internet simula kahapon",
                "sino po ang kausap ko",
            ],
        ),
        ("my", &["ကျွန်တော့်အော်ဒါ ဘယ်ရောက်နေပြီလဲ", "ရက်ချိန်း ပြောင်းချင်လို့ပါ", "မနက်ဖြန် ဘယ်အချိန်ဖွင့်လဲ", "ဟုတ်ကဲ့"]),
        ("km", &["តើការកម្ម៉ង់របស់ខ្ញុំនៅឯណា", "ខ្ញុំចង់ប្តូរម៉ោងណាត់", "ស្អែកបើកម៉ោងប៉ុន្មាន", "បាទ"]),
        ("lo", &["ຄຳສັ່ງຊື້ຂອງຂ້ອຍຢູ່ໃສ", "ຢາກປ່ຽນເວລານັດ", "ມື້ອື່ນເປີດຈັກໂມງ", "ແມ່ນແລ້ວ"]),
        (
            "ne",
            &[
                "मेरो अर्डर कहाँ छ",
                "म अपोइन्टमेन्ट सार्न चाहन्छु",
                "भोलि कति बजे खोल्नुहुन्छ",
                "मेरो सामान अझै आएको छैन",
                "मेरो कार्ड हरायो",
                "हिजोदेखि इन्टरनेट चलेको छैन",
            ],
        ),
        ("si", &["මගේ ඇණවුම කොහෙද", "මට වේලාව වෙනස් කරන්න ඕන", "හෙට කීයටද අරින්නේ", "ඔව්"]),
        (
            "kk",
            &[
                "Менің тапсырысым қайда?",
                "мен жазылуымды өзгерткім келеді",
                "ертең сағат нешеде ашыласыздар",
                "сәлемдеме әлі келген жоқ",
                "картамды жоғалтып алдым",
                "бүгін кешке екі адамға үстел бар ма",
                "кешеден бері интернет істемей тұр",
                "мен кіммен сөйлесіп тұрмын",
            ],
        ),
        (
            "uz",
            &[
                "Mening buyurtmam qayerda?",
                "men uchrashuvni boshqa kunga ko'chirmoqchiman",
                "ertaga soat nechada ochasizlar",
                "posilka hali yetib kelmadi",
                "менинг буюртмам қаерда",
                "kartamni yo'qotib qo'ydim",
                "bugun kechqurun ikki kishilik stol bormi",
                "kechadan beri internetim ishlamayapti",
                "men kim bilan gaplashyapman",
            ],
        ),
        (
            "sw",
            &[
                "Agizo langu liko wapi?",
                "ningependa kubadilisha miadi yangu",
                "kesho mnafungua saa ngapi",
                "kifurushi changu bado hakijafika",
                "nimepoteza kadi yangu",
                "mna meza ya watu wawili leo usiku",
                "mtandao wangu haufanyi kazi tangu jana",
                "naongea na nani",
            ],
        ),
        ("am", &["ትእዛዜ የት ነው", "ቀጠሮዬን መቀየር እፈልጋለሁ", "ነገ ስንት ሰዓት ትከፍታላችሁ", "አዎ"]),
        (
            "af",
            &[
                "Waar is my bestelling?",
                "ek wil graag my afspraak skuif",
                "hoe laat maak julle môre oop",
                "my pakkie het nog nie gekom nie",
                "goeie môre",
                "ek het my kaart verloor",
                "het julle vanaand 'n tafel vir twee",
                "my internet werk nie sedert gister nie",
                "met wie praat ek",
            ],
        ),
        (
            "yo",
            &[
                "Níbo ni ọjà mi wà?",
                "mo fẹ́ yí àkókò ìpàdé mi padà",
                "aago mélòó ni ẹ máa ṣí lọ́la",
                "ẹ káàárọ̀, mo fẹ́ bá yín sọ̀rọ̀",
                "mo ti sọ káàdì mi nù",
                "ṣé ẹ ní tábìlì fún ènìyàn méjì lálẹ́ yìí",
                "láti àná ni íńtánẹ́ẹ̀tì mi kò ti ṣiṣẹ́",
                "ta ni mò ń bá sọ̀rọ̀",
            ],
        ),
        (
            "ha",
            &[
                "Ina kayan da na saya suke?",
                "ina so in canza lokacin ganawa",
                "ƙarfe nawa kuke buɗewa gobe",
                "kayana ba su iso ba har yanzu",
                "na rasa katina",
                "kuna da tebur na mutum biyu a daren yau",
                "tun jiya intanet dina ba ya aiki",
                "da wa nake magana",
            ],
        ),
        (
            "zu",
            &[
                "Likuphi i-oda lami?",
                "ngifuna ukushintsha isikhathi sami",
                "nivula ngasikhathi sini kusasa",
                "iphakheji lami alikafiki",
                "ngilahlekelwe yikhadi lami",
                "ninalo yini itafula labantu ababili kusihlwa",
                "i-inthanethi yami ayisebenzi kusukela izolo",
                "ngikhuluma nobani",
            ],
        ),
    ];

    #[test]
    fn short_utterances_are_told_apart() {
        let mut total = 0;
        let mut misses = Vec::new();
        for (code, utterances) in UTTERANCES {
            assert!(utterances.len() >= 4, "{code}");
            for utterance in *utterances {
                total += 1;
                let found = said(utterance);
                if found != *code {
                    misses.push((*code, found, *utterance));
                }
            }
        }
        let right = 100.0 * (total - misses.len()) as f64 / total as f64;
        assert!(right >= 99.0, "{right:.1}% of {total}, missed: {misses:#?}");
        let surest = ["en", "es", "fr", "de", "it", "pt", "nl"];
        assert!(misses.iter().all(|(code, ..)| !surest.contains(code)), "{misses:#?}");
    }

    #[test]
    fn every_language_is_tried() {
        let tried: Vec<_> = UTTERANCES.iter().map(|(code, _)| *code).collect();
        assert_eq!(tried, CODES);
    }

    #[test]
    fn an_ambiguous_last_word_leaves_it_to_earlier_ones() {
        for last in ["ok", "12345", "Max Müller", "", "...", "👍", "José García", "Berlin"] {
            let words = ["Ich hätte gern einen Termin", last];
            assert_eq!(detect(words.into_iter(), Some("You are a helpful agent.")).code(), "de", "{last}");
        }
        let words = ["jeg vil gerne have hjælp", "hvor er den"];
        assert_eq!(detect(words.into_iter(), None).code(), "da");
        let words = ["我的訂單還沒到", "好"];
        assert_eq!(detect(words.into_iter(), None).code(), "zh-Hant");
    }

    #[test]
    fn the_last_words_decide_over_earlier_ones_and_over_the_prompt() {
        let words = ["I would like to know where my order is", "perdón, ¿habla usted español?"];
        assert_eq!(detect(words.into_iter(), Some("Speak only English.")).code(), "es");
    }

    #[test]
    fn the_prompt_decides_where_no_words_do() {
        for (prompt, code) in [
            ("You are an agent of a bank. Speak only German.", "de"),
            ("Antworte auf Deutsch.", "de"),
            ("Always respond in Spanish, and be brief.", "es"),
            ("You are a friendly agent. 日本語で話してください。", "ja"),
            ("Answer in French only.", "fr"),
            ("You are a German-speaking receptionist.", "de"),
            ("Language: Portuguese", "pt"),
            ("You must not answer in English. Reply in Polish.", "pl"),
            ("Respond in Traditional Chinese.", "zh-Hant"),
            ("Please speak Mandarin with the caller.", "zh-Hans"),
            ("Du bist ein Assistent. Antworte auf Englisch.", "en"),
            ("Hablas con clientes de una tienda. Sé breve y amable.", "es"),
            ("Je bent een vriendelijke medewerker van een bakkerij.", "nl"),
            ("Ты вежливый помощник магазина.", "ru"),
            ("You take orders in Thai restaurants.", "en"),
            ("You teach cooking.", "en"),
            ("", "en"),
        ] {
            for words in [&[][..], &["ok"], &["4711"]] {
                assert_eq!(detect(words.iter().copied(), Some(prompt)).code(), code, "{prompt} {words:?}");
            }
        }
        assert_eq!(detect(["да"].into_iter(), Some("You are a helpful agent.")).code(), "ru");
        assert_eq!(detect(["я"].into_iter(), Some("Ти ввічливий помічник.")).code(), "uk");
        assert_eq!(detect([].into_iter(), None), Language::ENGLISH);
        assert_eq!(detect(["ok", "12345", "Max Müller"].into_iter(), None), Language::ENGLISH);
    }

    #[test]
    fn the_prompt_breaks_ties_between_twins() {
        assert_eq!(detect(["你好"].into_iter(), Some("請用繁體中文回答。")).code(), "zh-Hant");
        assert_eq!(detect(["你好"].into_iter(), Some("Respond in Spanish.")).code(), "zh-Hans");
    }

    #[test]
    fn tags_are_read_in_many_spellings() {
        for (tag, code) in [
            ("en-US", "en"),
            ("EN", "en"),
            ("pt_BR", "pt"),
            ("zh", "zh-Hans"),
            ("zh-CN", "zh-Hans"),
            ("zh-TW", "zh-Hant"),
            ("zh-HK", "zh-Hant"),
            ("zh-Hant-TW", "zh-Hant"),
            ("ZH-HANS", "zh-Hans"),
            ("nb", "no"),
            ("nn-NO", "no"),
            ("tl", "fil"),
            ("fil-PH", "fil"),
            ("sr-Latn", "sr"),
            ("es-419", "es"),
        ] {
            assert_eq!(Language::from_code(tag).map(Language::code), Some(code), "{tag}");
        }
        for tag in ["", "-", "xx", "english", "é"] {
            assert_eq!(Language::from_code(tag), None, "{tag}");
        }
        for language in Language::all() {
            assert_eq!(Language::from_code(language.code()), Some(language));
        }
        assert_eq!(Language::ENGLISH.code(), "en");
    }

    #[test]
    fn odd_text_is_no_trouble() {
        let long = "где мой заказ ".repeat(100_000);
        for text in ["\0\0", "é", "ı", "İ", "ﬀ", "\u{200D}\u{0300}", "𠀀", "‎", long.as_str(), "a\u{0301}…*"]
        {
            let language = detect([text].into_iter(), Some(text));
            assert!(Language::all().any(|known| known == language));
        }
    }

    #[test]
    fn detection_takes_well_under_a_millisecond() {
        let utterance =
            "i would like to know where my order is because it has not arrived yet and i am leaving tomorrow";
        said(utterance);
        let start = Instant::now();
        let rounds = 200;
        for _ in 0..rounds {
            said(utterance);
        }
        let each = start.elapsed() / rounds;
        assert!(each.as_micros() < 2_000, "{each:?}");
    }

    #[test]
    fn wordings_match_whole_words() {
        let set =
            Patterns::new([("phone agent*", 1), ("say … moment", 2), ("电话客服", 3), ("l'appel", 4)].into_iter());
        let meaning = |text: &str| set.find(&folded_tokens(text)).map(|(_, meaning)| meaning).next();
        assert_eq!(meaning("A PHONE-AGENT's work"), Some(1));
        assert_eq!(meaning("a telephone agent"), None);
        assert_eq!(meaning("phone. Agent"), None);
        assert_eq!(meaning("say something like one moment"), Some(2));
        assert_eq!(meaning("say it. One moment"), None);
        assert_eq!(meaning("say a b c d e f g moment"), None);
        assert_eq!(meaning("你是电话客服人员"), Some(3));
        assert_eq!(meaning("pendant l’appel"), Some(4));
    }
}
