//! Takes the model's text apart into what is spoken and what is called.
//!
//! It works on the bytes of tokens as they come. Spoken text leaves the moment that it cannot be the start of a call or of
//! a stop text; arguments leave as they are generated.

use super::form::Syntax;

/// A piece of a turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Spoken text.
    Text(String),
    /// The model has opened a call; its name comes next.
    CallOpened,
    /// The call's name.
    CallNamed(String),
    /// More of its arguments.
    Arguments(String),
    /// The arguments are complete.
    CallEnded,
    /// A stop text came; it and what follows is no part of the answer.
    Stopped,
}

/// The parser of one turn.
pub struct Parser {
    /// None when there are no tools.
    syntax: Option<Syntax>,
    /// Whether a call may only come in place of an answer, not behind one.
    call_only_first: bool,
    stops: Vec<Vec<u8>>,
    state: State,
    /// Bytes that have not left yet.
    held: Vec<u8>,
    /// Whether any text has left.
    spoken: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Text,
    /// So many fixed bytes to skip before the name.
    BeforeName(usize),
    Name,
    /// So many fixed bytes to skip before the arguments.
    BeforeArguments(usize),
    Arguments(Json),
    /// So many fixed bytes to skip behind the arguments.
    AfterArguments(usize),
    /// A separator, the closing, or the end of the turn.
    Between,
    Done,
}

/// Where in a JSON value we are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Json {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

// === impl Parser ===

impl Parser {
    /// `syntax` is how calls are written, when there are tools; `stops` are texts that end the answer.
    pub fn new(syntax: Option<Syntax>, call_only_first: bool, stops: &[String]) -> Self {
        Self {
            syntax,
            call_only_first,
            stops: stops.iter().filter(|s| !s.is_empty()).map(|s| s.as_bytes().to_vec()).collect(),
            state: State::Text,
            held: Vec::new(),
            spoken: false,
        }
    }

    /// Starts behind the opening of a call that was part of the prompt.
    pub fn opened(&mut self) {
        self.state = State::BeforeName(self.syntax.map_or(0, |s| s.before_name.len()));
    }

    /// Takes the bytes of the next token and gives what has become certain.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<Parsed>) {
        self.held.extend_from_slice(bytes);
        while self.advance(out) {}
    }

    /// Takes note that nothing follows: what was held back leaves.
    pub fn finish(&mut self, out: &mut Vec<Parsed>) {
        if self.state == State::Text && !self.held.is_empty() {
            let rest = std::mem::take(&mut self.held);
            self.say(String::from_utf8_lossy(&rest).into_owned(), out);
        }
        self.state = State::Done;
    }

    fn say(&mut self, text: String, out: &mut Vec<Parsed>) {
        if !text.is_empty() {
            self.spoken = true;
            out.push(Parsed::Text(text));
        }
    }

    /// One step; whether another may follow.
    fn advance(&mut self, out: &mut Vec<Parsed>) -> bool {
        let syntax = self.syntax;
        match self.state {
            State::Text => self.text(out),
            State::BeforeName(skip) => self.skip(skip, State::BeforeName, State::Name),
            State::Name => {
                let Some(end) = self.held.iter().position(|b| *b == b'"') else {
                    return false;
                };
                let name: Vec<u8> = self.held.drain(..end).collect();
                out.push(Parsed::CallNamed(String::from_utf8_lossy(&name).into_owned()));
                self.state = State::BeforeArguments(syntax.map_or(0, |s| s.after_name.len()));
                true
            }
            State::BeforeArguments(skip) => self.skip(skip, State::BeforeArguments, State::Arguments(Json::default())),
            State::Arguments(json) => self.arguments(json, out),
            State::AfterArguments(skip) => self.skip(skip, State::AfterArguments, State::Between),
            State::Between => {
                let separator = syntax.map_or("", |s| s.separator).as_bytes();
                if self.held.is_empty() {
                    false
                } else if self.held.starts_with(separator) {
                    self.held.drain(..separator.len());
                    out.push(Parsed::CallOpened);
                    self.state = State::Name;
                    true
                } else {
                    // Either the separator is not complete yet, or this is the closing, of which nothing is shown.
                    false
                }
            }
            State::Done => {
                self.held.clear();
                false
            }
        }
    }

    /// Drops fixed bytes.
    fn skip(&mut self, count: usize, same: fn(usize) -> State, then: State) -> bool {
        let now = count.min(self.held.len());
        self.held.drain(..now);
        self.state = if now == count { then } else { same(count - now) };
        now == count
    }

    fn text(&mut self, out: &mut Vec<Parsed>) -> bool {
        let opening = self.syntax.filter(|_| !(self.call_only_first && self.spoken)).map(|s| s.opening.as_bytes());
        let call = opening.and_then(|opening| find(&self.held, opening));
        let stop = self.stops.iter().filter_map(|stop| find(&self.held, stop)).min();
        if let Some(at) = stop.filter(|stop| call.is_none_or(|call| *stop < call)) {
            let text = String::from_utf8_lossy(&self.held[..at]).into_owned();
            self.say(text, out);
            out.push(Parsed::Stopped);
            self.state = State::Done;
            return true;
        }
        if let (Some(at), Some(syntax)) = (call, self.syntax) {
            let text = String::from_utf8_lossy(&self.held[..at]).trim_end().to_owned();
            self.say(text, out);
            out.push(Parsed::CallOpened);
            self.held.drain(..at + syntax.opening.len());
            self.state = State::BeforeName(syntax.before_name.len());
            return true;
        }
        let mut certain = whole_characters(&self.held);
        for needle in self.stops.iter().map(Vec::as_slice).chain(opening) {
            certain = certain.min(self.held.len() - partial(&self.held, needle));
        }
        if opening.is_some() {
            // White space before a call belongs to nobody, so it waits for what follows it.
            certain = self.held[..certain].trim_ascii_end().len();
        }
        if certain > 0 {
            let text: Vec<u8> = self.held.drain(..certain).collect();
            self.say(String::from_utf8_lossy(&text).into_owned(), out);
        }
        false
    }

    fn arguments(&mut self, mut json: Json, out: &mut Vec<Parsed>) -> bool {
        let mut end = None;
        let mut scanned = json;
        let whole = whole_characters(&self.held);
        for (at, byte) in self.held[..whole].iter().enumerate() {
            if scanned.closes_with(*byte) {
                end = Some(at + 1);
                break;
            }
        }
        let take = end.unwrap_or(whole);
        if take > 0 {
            json = scanned;
            let text: Vec<u8> = self.held.drain(..take).collect();
            out.push(Parsed::Arguments(String::from_utf8_lossy(&text).into_owned()));
        }
        if end.is_some() {
            out.push(Parsed::CallEnded);
            self.state = State::AfterArguments(self.syntax.map_or(0, |s| s.after_arguments.len()));
            return true;
        }
        self.state = State::Arguments(json);
        false
    }
}

// === impl Json ===

impl Json {
    /// Takes a byte; whether the outermost object or list ends with it.
    fn closes_with(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

fn find(text: &[u8], needle: &[u8]) -> Option<usize> {
    text.windows(needle.len()).position(|window| window == needle)
}

/// How many bytes at the end of the text may be the start of the needle.
fn partial(text: &[u8], needle: &[u8]) -> usize {
    let most = text.len().min(needle.len().saturating_sub(1));
    (1..=most).rev().find(|len| text.ends_with(&needle[..*len])).unwrap_or(0)
}

/// Length of the text without a character that is cut off at its end.
fn whole_characters(text: &[u8]) -> usize {
    let back = text.iter().rev().take(4).position(|b| b & 0xC0 != 0x80);
    let Some(back) = back else { return text.len() };
    let lead = text[text.len() - 1 - back];
    let wanted = match lead {
        0xC0..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xF7 => 4,
        _ => 1,
    };
    if back + 1 < wanted { text.len() - 1 - back } else { text.len() }
}

#[cfg(test)]
mod tests {
    use super::{super::form::Form, Parsed::*, *};

    fn text(s: &str) -> Parsed {
        Text(s.into())
    }

    fn parse(form: Form, chunks: &[&str], stops: &[&str]) -> Vec<Parsed> {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut parser = Parser::new(Some(form.syntax()), false, &stops);
        let mut out = Vec::new();
        for chunk in chunks {
            parser.push(chunk.as_bytes(), &mut out);
        }
        parser.finish(&mut out);
        out
    }

    #[test]
    fn text_leaves_at_once_unless_it_may_be_an_opening() {
        let mut parser = Parser::new(Some(Form::Hermes.syntax()), false, &[]);
        let mut out = Vec::new();
        parser.push(b"Let me", &mut out);
        parser.push(b" see <", &mut out);
        assert_eq!(out, [text("Let me"), text(" see")]);
        parser.push(b"3 of them", &mut out);
        assert_eq!(out[2], text(" <3 of them"));
    }

    #[test]
    fn a_call_behind_words_in_hermes_form() {
        let chunks = [
            "One moment.",
            "\n<tool",
            "_call>",
            "\n{\"name",
            "\": \"find\", \"arg",
            "uments\": {\"a\": \"}\\\"",
            "\"}}\n</tool_call>",
        ];
        let got = parse(Form::Hermes, &chunks, &[]);
        let arguments: String =
            got.iter().filter_map(|p| if let Arguments(a) = p { Some(a.as_str()) } else { None }).collect();
        assert_eq!(arguments, "{\"a\": \"}\\\"\"}");
        assert_eq!(got[..3], [text("One moment."), CallOpened, CallNamed("find".into())]);
        assert_eq!(got.last(), Some(&CallEnded));
    }

    #[test]
    fn several_calls_in_each_form() {
        for (form, words) in [
            (
                Form::Hermes,
                "<tool_call>\n{\"name\": \"a\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"b\", \"arguments\": {\"x\": [1]}}\n</tool_call>",
            ),
            (Form::Llama3, "{\"name\": \"a\", \"parameters\": {}}; {\"name\": \"b\", \"parameters\": {\"x\": [1]}}"),
            (
                Form::Mistral,
                "[TOOL_CALLS][{\"name\": \"a\", \"arguments\": {}}, {\"name\": \"b\", \"arguments\": {\"x\": [1]}}]",
            ),
        ] {
            let want = [
                CallOpened,
                CallNamed("a".into()),
                Arguments("{}".into()),
                CallEnded,
                CallOpened,
                CallNamed("b".into()),
                Arguments("{\"x\": [1]}".into()),
                CallEnded,
            ];
            assert_eq!(parse(form, &[words], &[]), want, "{form:?} at once");
            // Byte by byte the same calls come, with the arguments in pieces.
            let bytes: Vec<String> = words.chars().map(String::from).collect();
            let bytes: Vec<&str> = bytes.iter().map(String::as_str).collect();
            let mut got = parse(form, &bytes, &[]);
            got.dedup_by(|b, a| match (a, b) {
                (Arguments(a), Arguments(b)) => {
                    a.push_str(b);
                    true
                }
                _ => false,
            });
            assert_eq!(got, want, "{form:?} byte by byte");
        }
    }

    #[test]
    fn a_stop_text_that_spans_tokens_ends_the_answer() {
        assert_eq!(parse(Form::Hermes, &["one ST", "OP two"], &["STOP"]), [text("one"), text(" "), Stopped]);
        assert_eq!(parse(Form::Hermes, &["one ST", "ART"], &["STOP"]), [text("one"), text(" START")]);
    }

    #[test]
    fn characters_are_never_cut() {
        let mut parser = Parser::new(None, false, &[]);
        let mut out = Vec::new();
        for byte in "né€🙂".bytes() {
            parser.push(&[byte], &mut out);
        }
        assert_eq!(out, [text("n"), text("é"), text("€"), text("🙂")]);
        parser.push(&[0xE2, 0x82], &mut out);
        parser.finish(&mut out);
        assert_eq!(out.last(), Some(&text("\u{FFFD}")));
    }

    #[test]
    fn nothing_is_dropped_when_bytes_are_no_utf8() {
        let mut parser = Parser::new(None, false, &[]);
        let mut out = Vec::new();
        parser.push(&[0xFF, b'a', 0x80, 0x80, 0x80, 0x80, 0x80], &mut out);
        parser.finish(&mut out);
        assert!(matches!(&out[0], Text(t) if t.contains('a')));
    }
}
