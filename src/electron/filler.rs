//! What the caller hears while a tool runs: the phrase book, and when it is used.
//!
//! A caller who hears nothing for a second thinks the line is dead. So a voice agent says a short phrase before it calls a
//! tool. Whether an agent is one, its system prompt tells, in whatever language that is written.

use std::{collections::BTreeMap, sync::LazyLock};

use rand::{SeedableRng, rngs::StdRng, seq::IteratorRandom};
use serde::Deserialize;

use super::language::{Language, Patterns};

/// Where in a turn a phrase is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before the first round of tool calls.
    First,
    /// Before a later round, after results have come back.
    Chained,
    /// While a tool runs longer than silence is comfortable.
    StillWaiting,
    /// As the agent ends the call.
    Goodbye,
    /// When something failed and there is no answer.
    Trouble,
}

/// Whether a system prompt is written for an agent that speaks: on the phone or otherwise out loud.
///
/// Understands prompts in any language of the book, whatever language the caller speaks. A mention of telephones alone
/// does not make a voice agent.
pub fn is_voice_prompt(system_prompt: &str) -> bool {
    VOICE_PROMPT.is_in(system_prompt)
}

static VOICE_PROMPT: LazyLock<Patterns<()>> = LazyLock::new(|| {
    Patterns::new(
        Language::all().flat_map(|language| entry(language).voice_prompt.iter().map(|wording| (wording.as_str(), ()))),
    )
});

/// Draws phrases at random for one conversation or turn, never the same one twice running.
#[derive(Clone, Debug)]
pub struct Phrases {
    rng: StdRng,
    /// The phrase drawn before.
    previous: Option<&'static str>,
}

// === impl Phrases ===

impl Phrases {
    /// The same seed gives the same phrases in the same order; without one they differ from run to run.
    pub fn new(seed: Option<u64>) -> Phrases {
        let rng = match seed {
            Some(seed) => StdRng::seed_from_u64(seed),
            None => StdRng::from_os_rng(),
        };
        Phrases { rng, previous: None }
    }

    /// A phrase in this language for this place, other than the one drawn before and other than `last`, the words that the
    /// caller heard last.
    pub fn draw(&mut self, language: Language, place: Place, last: Option<&str>) -> &'static str {
        let entry = entry(language);
        let phrases = match place {
            Place::First => &entry.first,
            Place::Chained => &entry.chained,
            Place::StillWaiting => &entry.still_waiting,
            Place::Goodbye => &entry.goodbye,
            Place::Trouble => &entry.trouble,
        };
        let last = last.map(str::trim);
        let phrase = phrases
            .iter()
            .map(String::as_str)
            .filter(|&phrase| Some(phrase) != last && Some(phrase) != self.previous)
            .choose_stable(&mut self.rng)
            .expect("the book has at least three phrases for every place, and two are ruled out");
        self.previous = Some(phrase);
        phrase
    }
}

// === The book ===

/// What the book has on one language. The fields are explained at the head of `phrases.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) native: String,
    #[serde(default)]
    pub(super) also_called: Vec<String>,
    first: Vec<String>,
    chained: Vec<String>,
    still_waiting: Vec<String>,
    goodbye: Vec<String>,
    trouble: Vec<String>,
    voice_prompt: Vec<String>,
    #[serde(default)]
    pub(super) hint: Vec<String>,
    #[serde(default)]
    pub(super) words: String,
}

/// The languages in the order of their indexes.
static BOOK: LazyLock<Vec<Entry>> = LazyLock::new(|| {
    let mut tables: BTreeMap<String, Entry> = toml::from_str(include_str!("phrases.toml"))
        .expect("phrases.toml is part of the program and its tests read it");
    Language::all()
        .map(|language| tables.remove(language.code()).expect("phrases.toml has a table for every code"))
        .collect()
});

pub(super) fn entry(language: Language) -> &'static Entry {
    &BOOK[language.index()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// For every language a prompt for a voice agent, and one for an assistant that writes.
    const PROMPTS: &[(&str, &str, &str)] = &[
        (
            "en",
            "You are a friendly phone agent for a bakery. Briefly acknowledge out loud before using any tool, like 'One moment'.",
            "You are a helpful assistant that answers questions about phones and orders.",
        ),
        (
            "es",
            "Eres un agente telefónico amable de una clínica. Antes de usar una herramienta, di algo como «un momento».",
            "Eres un asistente útil que responde preguntas sobre teléfonos y pedidos.",
        ),
        (
            "fr",
            "Vous êtes l'assistante vocale d'un cabinet médical et vous parlez au téléphone avec les patients.",
            "Tu es un assistant utile qui répond aux questions sur les téléphones et les commandes.",
        ),
        (
            "de",
            "Du bist eine freundliche Telefonagentin einer Arztpraxis. Sag kurz etwas, bevor du ein Werkzeug benutzt.",
            "Du bist ein hilfreicher Assistent, der Fragen zu Telefonen und Bestellungen beantwortet. Nimm dir einen Moment Zeit.",
        ),
        (
            "it",
            "Sei l'assistente vocale di un ristorante. Prima di usare uno strumento, di' qualcosa come «un attimo».",
            "Sei un assistente che risponde a domande su telefoni e ordini.",
        ),
        (
            "pt",
            "Você é uma atendente telefônica simpática. Fale com quem liga de forma breve.",
            "Você é um assistente que responde a perguntas sobre telefones e pedidos.",
        ),
        (
            "nl",
            "Je bent een vriendelijke telefonische medewerker en praat met klanten aan de telefoon.",
            "Je bent een behulpzame assistent die vragen over telefoons en bestellingen beantwoordt.",
        ),
        (
            "ca",
            "Ets un agent de veu d'una clínica i parles amb les persones que truquen.",
            "Ets un assistent que respon preguntes sobre telèfons i comandes.",
        ),
        (
            "hi",
            "आप एक क्लिनिक के फ़ोन एजेंट हैं। टूल इस्तेमाल करने से पहले कॉलर से कहें कि एक पल रुकें।",
            "आप एक सहायक हैं जो फ़ोन और ऑर्डर के बारे में सवालों के जवाब देते हैं।",
        ),
        (
            "bn",
            "আপনি একটি ক্লিনিকের ভয়েস এজেন্ট। ফোনে কথা বলার সময় সংক্ষেপে উত্তর দিন।",
            "আপনি একজন সহকারী, যিনি ফোন ও অর্ডার সম্পর্কে প্রশ্নের উত্তর দেন।",
        ),
        (
            "ta",
            "நீங்கள் ஒரு மருத்துவமனையின் குரல் உதவியாளர். அழைப்பாளரிடம் சுருக்கமாகப் பேசுங்கள்.",
            "நீங்கள் தொலைபேசிகள் மற்றும் ஆர்டர்கள் பற்றிய கேள்விகளுக்குப் பதிலளிக்கும் உதவியாளர்.",
        ),
        ("te", "మీరు ఒక క్లినిక్ ఫోన్ ఏజెంట్. కాలర్‌తో క్లుప్తంగా మాట్లాడండి.", "మీరు ఫోన్లు మరియు ఆర్డర్ల గురించి ప్రశ్నలకు సమాధానం ఇచ్చే సహాయకుడు."),
        (
            "mr",
            "तुम्ही एका दवाखान्याचे व्हॉइस असिस्टंट आहात आणि फोनवर बोलता.",
            "तुम्ही फोन आणि ऑर्डरबद्दल प्रश्नांची उत्तरे देणारे सहाय्यक आहात.",
        ),
        (
            "gu",
            "તમે ક્લિનિકના વૉઇસ એજન્ટ છો અને ફોન પર ગ્રાહકો સાથે વાત કરો છો.",
            "તમે ફોન અને ઓર્ડર વિશે પ્રશ્નોના જવાબ આપતા સહાયક છો.",
        ),
        (
            "kn",
            "ನೀವು ಆಸ್ಪತ್ರೆಯ ಧ್ವನಿ ಸಹಾಯಕರು. ಕರೆ ಮಾಡುವವರೊಂದಿಗೆ ಚುಟುಕಾಗಿ ಮಾತನಾಡಿ.",
            "ನೀವು ಫೋನ್ ಮತ್ತು ಆರ್ಡರ್‌ಗಳ ಬಗ್ಗೆ ಪ್ರಶ್ನೆಗಳಿಗೆ ಉತ್ತರಿಸುವ ಸಹಾಯಕರು.",
        ),
        (
            "ml",
            "നിങ്ങൾ ഒരു ആശുപത്രിയുടെ വോയ്‌സ് ഏജന്റാണ്. ഫോണിലൂടെ സംസാരിക്കുന്നു.",
            "ഫോണുകളെയും ഓർഡറുകളെയും കുറിച്ചുള്ള ചോദ്യങ്ങൾക്ക് ഉത്തരം നൽകുന്ന സഹായിയാണ് നിങ്ങൾ.",
        ),
        (
            "pa",
            "ਤੁਸੀਂ ਇੱਕ ਕਲੀਨਿਕ ਦੇ ਫ਼ੋਨ ਏਜੰਟ ਹੋ। ਟੂਲ ਵਰਤਣ ਤੋਂ ਪਹਿਲਾਂ ਕਾਲਰ ਨੂੰ ਕਹੋ ਕਿ ਇੱਕ ਮਿੰਟ ਰੁਕੋ।",
            "ਤੁਸੀਂ ਫ਼ੋਨਾਂ ਅਤੇ ਆਰਡਰਾਂ ਬਾਰੇ ਸਵਾਲਾਂ ਦੇ ਜਵਾਬ ਦੇਣ ਵਾਲੇ ਸਹਾਇਕ ਹੋ।",
        ),
        ("or", "ଆପଣ ଏକ କ୍ଲିନିକର ଭଏସ୍ ଏଜେଣ୍ଟ ଏବଂ ଫୋନରେ ଗ୍ରାହକଙ୍କ ସହ କଥା ହୁଅନ୍ତି।", "ଆପଣ ଫୋନ୍ ଏବଂ ଅର୍ଡର ବିଷୟରେ ପ୍ରଶ୍ନର ଉତ୍ତର ଦେଉଥିବା ସହାୟକ।"),
        (
            "ur",
            "آپ ایک کلینک کے فون ایجنٹ ہیں۔ ٹول استعمال کرنے سے پہلے کالر سے کہیں کہ ایک لمحہ رکیں۔",
            "آپ ایک معاون ہیں جو فون اور آرڈر کے بارے میں سوالات کے جواب دیتا ہے۔",
        ),
        (
            "pl",
            "Jesteś asystentem głosowym przychodni i rozmawiasz z pacjentami przez telefon.",
            "Jesteś pomocnym asystentem, który odpowiada na pytania o telefony i zamówienia.",
        ),
        (
            "ru",
            "Ты голосовой помощник клиники. Отвечай позвонившему коротко.",
            "Ты полезный помощник, который отвечает на вопросы о телефонах и заказах.",
        ),
        (
            "uk",
            "Ти голосовий асистент клініки й розмовляєш із пацієнтами телефоном.",
            "Ти корисний помічник, який відповідає на запитання про телефони та замовлення.",
        ),
        (
            "be",
            "Ты галасавы памочнік клінікі. Адказвай таму, хто тэлефануе, коратка.",
            "Ты карысны памочнік, які адказвае на пытанні пра тэлефоны і заказы.",
        ),
        (
            "cs",
            "Jsi hlasový asistent kliniky. Než použiješ nástroj, řekni volajícímu něco krátkého.",
            "Jsi užitečný asistent, který odpovídá na otázky o telefonech a objednávkách.",
        ),
        (
            "sk",
            "Si telefónny asistent kliniky. Skôr ako použiješ nástroj, povedz volajúcemu niečo krátke.",
            "Si užitočný asistent, ktorý odpovedá na otázky o telefónoch a objednávkach.",
        ),
        (
            "ro",
            "Ești un asistent vocal al unei clinici și răspunzi la telefon.",
            "Ești un asistent util care răspunde la întrebări despre telefoane și comenzi.",
        ),
        (
            "hu",
            "Egy klinika telefonos ügyfélszolgálata vagy. Beszélj röviden a hívóval.",
            "Segítőkész asszisztens vagy, aki telefonokkal és rendelésekkel kapcsolatos kérdésekre válaszol.",
        ),
        (
            "bg",
            "Ти си гласов асистент на клиника и говориш с пациентите по телефона.",
            "Ти си полезен асистент, който отговаря на въпроси за телефони и поръчки.",
        ),
        (
            "hr",
            "Ti si glasovni asistent klinike. Prije korištenja alata reci pozivatelju nešto kratko.",
            "Ti si koristan asistent koji odgovara na pitanja o telefonima i narudžbama.",
        ),
        (
            "sr",
            "Ти си гласовни асистент клинике. Пре коришћења алата реци позиваоцу нешто кратко.",
            "Ти си користан асистент који одговара на питања о телефонима и поруџбинама.",
        ),
        (
            "sl",
            "Si glasovni asistent klinike in se pogovarjaš s pacienti po telefonu.",
            "Si koristen pomočnik, ki odgovarja na vprašanja o telefonih in naročilih.",
        ),
        (
            "mk",
            "Ти си гласовен асистент на клиника. Пред да употребиш алатка, кажи му нешто на повикувачот.",
            "Ти си корисен асистент што одговара на прашања за телефони и нарачки.",
        ),
        (
            "sq",
            "Ti je asistent zanor i një klinike dhe flet me pacientët në telefon.",
            "Ti je një asistent i dobishëm që u përgjigjet pyetjeve për telefona dhe porosi.",
        ),
        (
            "et",
            "Sa oled kliiniku häälassistent. Räägi helistajaga lühidalt.",
            "Sa oled abivalmis assistent, kes vastab küsimustele telefonide ja tellimuste kohta.",
        ),
        (
            "lv",
            "Tu esi klīnikas balss asistents un runā ar pacientiem pa tālruni.",
            "Tu esi izpalīdzīgs asistents, kas atbild uz jautājumiem par tālruņiem un pasūtījumiem.",
        ),
        (
            "lt",
            "Tu esi klinikos balso asistentas ir kalbi su pacientais telefonu.",
            "Tu esi paslaugus asistentas, atsakantis į klausimus apie telefonus ir užsakymus.",
        ),
        (
            "sv",
            "Du är en röstassistent för en klinik. Säg något kort till den som ringer innan du använder ett verktyg.",
            "Du är en hjälpsam assistent som svarar på frågor om telefoner och beställningar.",
        ),
        (
            "no",
            "Du er en telefonassistent for en klinikk. Si noe kort før du bruker et verktøy.",
            "Du er en hjelpsom assistent som svarer på spørsmål om telefoner og bestillinger.",
        ),
        (
            "da",
            "Du er en stemmeassistent for en klinik. Sig noget kort, inden du bruger et værktøj.",
            "Du er en hjælpsom assistent, der svarer på spørgsmål om telefoner og bestillinger.",
        ),
        (
            "fi",
            "Olet klinikan puheavustaja. Sano soittajalle jotain lyhyttä ennen kuin käytät työkalua.",
            "Olet avulias assistentti, joka vastaa kysymyksiin puhelimista ja tilauksista.",
        ),
        (
            "is",
            "Þú ert raddaðstoð fyrir heilsugæslu. Segðu eitthvað stutt við þann sem hringir.",
            "Þú ert hjálpsamur aðstoðarmaður sem svarar spurningum um síma og pantanir.",
        ),
        (
            "el",
            "Είσαι φωνητικός βοηθός μιας κλινικής και μιλάς με ασθενείς στο τηλέφωνο.",
            "Είσαι ένας χρήσιμος βοηθός που απαντά σε ερωτήσεις για τηλέφωνα και παραγγελίες.",
        ),
        (
            "tr",
            "Bir kliniğin sesli asistanısın. Arayan kişiyle kısa konuş.",
            "Telefonlar ve siparişlerle ilgili soruları yanıtlayan yardımsever bir asistansın.",
        ),
        (
            "ar",
            "أنت مساعد صوتي لعيادة. قبل استخدام أي أداة قل للمتصل شيئاً قصيراً.",
            "أنت مساعد مفيد يجيب عن الأسئلة حول الهواتف والطلبات.",
        ),
        ("he", "אתה נציג טלפוני של מרפאה. דבר בקצרה עם המתקשר.", "אתה עוזר מועיל שעונה על שאלות על טלפונים והזמנות."),
        (
            "fa",
            "شما دستیار صوتی یک درمانگاه هستید و با تماس‌گیرنده کوتاه صحبت می‌کنید.",
            "شما یک دستیار مفید هستید که به پرسش‌ها درباره تلفن و سفارش پاسخ می‌دهد.",
        ),
        (
            "ku",
            "Tu alîkarekî dengî yê klînîkekê yî û bi telefonê diaxivî.",
            "Tu alîkarek î ku bersiva pirsên li ser telefon û siparîşan dide.",
        ),
        (
            "zh-Hans",
            "你是一家诊所的电话客服。使用工具之前，先说一句“请稍等”。",
            "你是一个乐于助人的助手，回答有关手机和订单的问题。",
        ),
        (
            "zh-Hant",
            "你是一家診所的語音助理，請簡短地回答來電者。",
            "你是一個樂於助人的助理，回答有關手機和訂單的問題。",
        ),
        (
            "ja",
            "あなたはクリニックの電話オペレーターです。ツールを使う前に一言伝えてください。",
            "あなたは電話機と注文に関する質問に答える親切なアシスタントです。",
        ),
        (
            "ko",
            "당신은 병원의 전화 상담원입니다. 도구를 사용하기 전에 짧게 말하세요.",
            "당신은 전화기와 주문에 관한 질문에 답하는 도우미입니다.",
        ),
        (
            "mn",
            "Та эмнэлгийн дуут туслах бөгөөд өвчтөнтэй утсаар ярьдаг.",
            "Та утас болон захиалгын тухай асуултад хариулдаг туслах юм.",
        ),
        (
            "vi",
            "Bạn là trợ lý giọng nói của một phòng khám. Hãy trả lời người gọi thật ngắn gọn.",
            "Bạn là trợ lý hữu ích trả lời câu hỏi về điện thoại và đơn hàng.",
        ),
        ("th", "คุณเป็นผู้ช่วยเสียงของคลินิก ตอบผู้โทรอย่างสั้นกระชับ", "คุณเป็นผู้ช่วยที่ตอบคำถามเกี่ยวกับโทรศัพท์และคำสั่งซื้อ"),
        (
            "id",
            "Anda adalah agen telepon sebuah klinik. Sebelum memakai alat, katakan sesuatu yang singkat.",
            "Anda adalah asisten yang menjawab pertanyaan tentang telepon dan pesanan.",
        ),
        (
            "ms",
            "Anda ialah pembantu suara sebuah klinik. Jawab pemanggil dengan ringkas.",
            "Anda ialah pembantu yang menjawab soalan tentang telefon dan pesanan.",
        ),
        (
            "fil",
            "Ikaw ay isang ahente sa telepono ng klinika. Maging maikli sa tumatawag.",
            "Ikaw ay isang katulong na sumasagot sa mga tanong tungkol sa mga telepono at order.",
        ),
        (
            "my",
            "သင်သည် ဆေးခန်းတစ်ခု၏ အသံလက်ထောက် ဖြစ်သည်။ ဖုန်းခေါ်ဆိုသူကို တိုတိုပြောပါ။",
            "သင်သည် ဖုန်းများနှင့် အော်ဒါများအကြောင်း မေးခွန်းများကို ဖြေသော လက်ထောက် ဖြစ်သည်။",
        ),
        ("km", "អ្នកគឺជាជំនួយការសំឡេងរបស់គ្លីនិក។ សូមឆ្លើយអ្នកហៅទូរស័ព្ទដោយខ្លី។", "អ្នកគឺជាជំនួយការដែលឆ្លើយសំណួរអំពីទូរស័ព្ទ និងការបញ្ជាទិញ។"),
        ("lo", "ທ່ານແມ່ນຜູ້ຊ່ວຍສຽງຂອງຄລີນິກ ແລະ ລົມທາງໂທລະສັບກັບຄົນເຈັບ.", "ທ່ານແມ່ນຜູ້ຊ່ວຍທີ່ຕອບຄຳຖາມກ່ຽວກັບໂທລະສັບ ແລະ ຄຳສັ່ງຊື້."),
        (
            "ne",
            "तपाईं क्लिनिकको भ्वाइस असिस्टेन्ट हुनुहुन्छ र फोनमा बिरामीसँग कुरा गर्नुहुन्छ।",
            "तपाईं फोन र अर्डरबारे प्रश्नको जवाफ दिने सहायक हुनुहुन्छ।",
        ),
        ("si", "ඔබ සායනයක හඬ සහායකයෙක්. අමතන්නාට කෙටියෙන් පිළිතුරු දෙන්න.", "ඔබ දුරකථන සහ ඇණවුම් ගැන ප්‍රශ්නවලට පිළිතුරු දෙන සහායකයෙක්."),
        (
            "kk",
            "Сен емхананың дауыстық көмекшісісің. Қоңырау шалушымен қысқа сөйлес.",
            "Сен телефондар мен тапсырыстар туралы сұрақтарға жауап беретін көмекшісің.",
        ),
        (
            "uz",
            "Siz klinikaning ovozli yordamchisisiz va bemorlar bilan telefon orqali gaplashasiz.",
            "Siz telefonlar va buyurtmalar haqidagi savollarga javob beradigan yordamchisiz.",
        ),
        (
            "sw",
            "Wewe ni msaidizi wa sauti wa kliniki. Jibu anayepiga simu kwa ufupi.",
            "Wewe ni msaidizi anayejibu maswali kuhusu simu na oda.",
        ),
        ("am", "አንተ የክሊኒክ የድምፅ ረዳት ነህ። ከደዋዩ ጋር ባጭሩ ተነጋገር።", "አንተ ስለ ስልኮችና ትእዛዞች ጥያቄዎችን የምትመልስ ረዳት ነህ።"),
        (
            "af",
            "Jy is 'n stemassistent van 'n kliniek en praat met pasiënte oor die telefoon.",
            "Jy is 'n behulpsame assistent wat vrae oor telefone en bestellings beantwoord.",
        ),
        (
            "yo",
            "Ìwọ ni olùrànlọ́wọ́ olóhùn ilé ìwòsàn. Dá ẹni tó ń pe lóhùn ní ṣókí.",
            "Ìwọ ni olùrànlọ́wọ́ tó ń dáhùn ìbéèrè nípa fóònù àti ọjà.",
        ),
        (
            "ha",
            "Kai mataimakin murya ne na asibiti. Ka amsa wa mai kira a takaice.",
            "Kai mataimaki ne mai amsa tambayoyi game da wayoyi da oda.",
        ),
        (
            "zu",
            "Ungumsizi wezwi womtholampilo. Phendula ofonayo ngamafuphi. Umsizi wezwi ukhuluma ocingweni.",
            "Ungumsizi ophendula imibuzo ngezingcingo nama-oda.",
        ),
    ];

    #[test]
    fn a_voice_prompt_is_known_in_every_language() {
        let codes: Vec<_> = PROMPTS.iter().map(|(code, ..)| *code).collect();
        let all: Vec<_> = Language::all().map(Language::code).collect();
        assert_eq!(codes, all);
        let unheard: Vec<_> = PROMPTS.iter().filter(|(_, voice, _)| !is_voice_prompt(voice)).collect();
        assert!(unheard.is_empty(), "{unheard:#?}");
        let misheard: Vec<_> = PROMPTS.iter().filter(|(.., ordinary)| is_voice_prompt(ordinary)).collect();
        assert!(misheard.is_empty(), "{misheard:#?}");
    }

    #[test]
    fn common_wordings_of_voice_prompts_are_known() {
        for prompt in [
            "You are Ava, a voice assistant for Acme Dental.",
            "You're on the phone with a customer of a bank. Keep it short.",
            "Greet the caller and ask for the order number.",
            "Your replies are converted to speech, so use no markdown.",
            "Your output goes to text-to-speech.",
            "Acknowledge the request before using a tool.",
            "Before calling any tool, say something like \"Let me check that for you\".",
            "Before you use a tool, say a short filler phrase.",
            "SPEAK AS A PHONE AGENT.",
            "You handle inbound calls for a hotel.",
            "You are a voice-based\nagent.",
            "Antes de usar una herramienta, di brevemente: «Un momento».",
            "Eres un asistente telefonico",
        ] {
            assert!(is_voice_prompt(prompt), "{prompt}");
        }
    }

    #[test]
    fn telephones_and_voices_alone_make_no_voice_prompt() {
        for prompt in [
            "",
            "You are a helpful assistant.",
            "You sell voice recorders.",
            "You are a phone shop's assistant. Recommend a phone and a contract.",
            "If you cannot help, tell the user to contact support by phone at 555-0100.",
            "You are a coding assistant. Call tools when needed and acknowledge uncertainty.",
            "Write in the active voice. Take a moment to think before you use a tool.",
            "Eres un asistente de programación: explica las llamadas a la API.",
            "Du bist ein Assistent für Bellerophon. Telefonnummern gibst du nie heraus.",
            "Answer questions about telephones, headphones and microphones.",
        ] {
            assert!(!is_voice_prompt(prompt), "{prompt}");
        }
    }

    #[test]
    fn the_book_is_complete() {
        let tables: BTreeMap<String, Entry> = toml::from_str(include_str!("phrases.toml")).expect("a book");
        assert_eq!(tables.len(), Language::all().count(), "a table without a code in CODES");
        for language in Language::all() {
            let entry = entry(language);
            let code = language.code();
            assert!(!entry.name.is_empty() && !entry.native.is_empty(), "{code}");
            for (least, list) in [
                (4, &entry.first),
                (3, &entry.chained),
                (3, &entry.still_waiting),
                (3, &entry.goodbye),
                (3, &entry.trouble),
                (6, &entry.voice_prompt),
                (0, &entry.hint),
                (0, &entry.also_called),
            ] {
                assert!(list.len() >= least, "{code}: {list:?}");
                assert!(list.iter().all(|text| !text.is_empty() && text.trim() == text), "{code}: {list:?}");
                assert_eq!(list.iter().collect::<BTreeSet<_>>().len(), list.len(), "{code} repeats itself: {list:?}");
            }
            for wording in entry.voice_prompt.iter().chain(&entry.hint) {
                assert_eq!(*wording, wording.to_lowercase(), "{code}");
            }
            for stem in entry.words.split_whitespace().filter_map(|word| word.strip_suffix('*')) {
                assert!(stem.chars().count() >= 3, "{code}: {stem}* would match too much");
            }
            let spoken = [&entry.first, &entry.chained, &entry.still_waiting, &entry.goodbye, &entry.trouble];
            for phrase in spoken.into_iter().flatten() {
                assert!(phrase.chars().count() <= 80, "{code}: too long to be a filler: {phrase}");
                assert!(!phrase.contains(['{', '}', '<', '>', '*', '…']), "{code}: {phrase}");
                // Thai has no full stop; the others are Burmese, Khmer, Ethiopic, Urdu and the Arabic question mark.
                let stops =
                    ['.', '?', '!', '。', '！', '？', '।', '\u{104B}', '\u{17D4}', '\u{1362}', '\u{06D4}', '\u{061F}'];
                // A Greek question ends in a semicolon.
                let ends = phrase.ends_with(stops) || code == "el" && phrase.ends_with(';');
                assert!(code == "th" || ends, "{code}: {phrase}");
            }
        }
    }

    #[test]
    fn no_phrase_comes_twice_running() {
        for seed in 0..40 {
            let mut phrases = Phrases::new(Some(seed));
            for language in Language::all() {
                for place in [Place::First, Place::Chained, Place::StillWaiting, Place::Goodbye, Place::Trouble] {
                    let mut before = phrases.draw(language, place, None);
                    for _ in 0..6 {
                        // What was heard in between came from another draw, as after a reconnect.
                        let heard = Phrases::new(None).draw(language, place, Some(before));
                        let drawn = phrases.draw(language, place, Some(&format!(" {heard}\n")));
                        assert_ne!(drawn, before);
                        assert_ne!(drawn, heard);
                        before = drawn;
                    }
                }
            }
        }
    }

    #[test]
    fn a_seed_repeats_its_phrases() {
        let sequence = |seed| {
            let mut phrases = Phrases::new(Some(seed));
            (0..12).map(|_| phrases.draw(Language::ENGLISH, Place::First, None)).collect::<Vec<_>>()
        };
        assert_eq!(sequence(7), sequence(7));
        assert_ne!(sequence(7), sequence(8));
    }

    #[test]
    fn every_phrase_is_drawn_some_time() {
        let mut phrases = Phrases::new(Some(1));
        let drawn: BTreeSet<_> = (0..500).map(|_| phrases.draw(Language::ENGLISH, Place::First, None)).collect();
        assert_eq!(drawn.len(), entry(Language::ENGLISH).first.len());
    }
}
