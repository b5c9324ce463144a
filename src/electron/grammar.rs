//! What the model may say next: tool calls that are always valid, JSON answers, stop texts.
//!
//! Free text is not constrained at all. The moment the model opens a call, a grammar of the declared tools takes over, so
//! that a call can only name one of them, with arguments that are valid under its schema. A turn that has to call starts
//! inside that grammar.

use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use llguidance::{Matcher, ParserFactory, api::TopLevelGrammar, toktrie::SimpleVob};
use serde_json::{Value, json};

use super::form::{Form, Piece, pieces};
use crate::{
    engine::token::{Flow, Guide, ModelInfo},
    error::{Error, Fault},
    turn::{Message, OutputFormat, Tool, ToolChoice, Turn},
};

/// Most calls in one turn.
const MOST_CALLS: usize = 8;

/// Texts with which a model that is not sure of its call syntax begins to imitate it, and which nobody wants to hear.
const NEVER_SPOKEN: [&str; 2] = ["<tool", "</tool"];

/// Compiled grammars that are kept: agents use the same tools turn after turn.
const KEPT: usize = 64;

/// Tokens of one turn's calls after which the model is led to their end. Schemas rarely bound their strings and lists,
/// and a weak model may not find the end of one.
const CALL_LIMIT: usize = 512;

/// The same for a JSON answer.
const JSON_LIMIT: usize = 2048;

/// Tokens before the end of the budget at which calls are led to their end.
const CALL_RESERVE: usize = 32;

/// Compiles grammars for one model.
pub struct Grammars {
    model: Arc<ModelInfo>,
    factory: ParserFactory,
    form: Form,
    kept: Mutex<VecDeque<(u64, Matcher)>>,
}

/// What a turn's guide starts with.
pub struct Plan {
    /// The guide.
    pub guide: TurnGuide,
    /// Tokens that the answer has to begin with. They are computed with the prompt, which is faster than generating them.
    pub opening: Vec<u32>,
}

// === impl Grammars ===

impl Grammars {
    /// For a model and its call syntax.
    ///
    /// # Errors
    /// When the vocabulary is of no use to llguidance.
    pub fn new(model: Arc<ModelInfo>, form: Form) -> Result<Self, String> {
        let mut factory = ParserFactory::new_simple(model.vocabulary.env()).map_err(|e| e.to_string())?;
        factory.quiet();
        Ok(Self { model, factory, form, kept: Mutex::new(VecDeque::new()) })
    }

    /// The guide of a turn. `speaks` says whether text may come before a call.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the tool or the format whose schema cannot be compiled.
    pub fn plan(&self, turn: &Turn, speaks: bool, max_tokens: usize) -> Result<Plan, Error> {
        let syntax = self.form.syntax();
        let forced = matches!(turn.tool_choice, ToolChoice::Required | ToolChoice::Named(_));
        let may_call = turn.may_call();
        let answer = match &turn.format {
            OutputFormat::Text => None,
            OutputFormat::JsonObject => Some(json!({"type": "object"})),
            OutputFormat::JsonSchema(schema) => Some(schema.clone()),
        };
        let phase = if forced && may_call {
            Phase::Calls(self.calls(turn)?)
        } else if let Some(schema) = answer {
            let answer = format!("answer: %json {}\n", compact(schema));
            let in_schema = |why| {
                let path = ["response_format".into(), "json_schema".into(), "schema".into()];
                Error::Invalid(vec![Fault::new(path, format!("The schema cannot be used: {why}"))])
            };
            let alone = self.compile(&format!("start: answer\n{answer}")).map_err(in_schema)?;
            if may_call {
                // Checks the tools first, so that a fault is reported where it is.
                self.calls(turn)?;
                let (opening, calls) =
                    (self.literal(syntax.opening), self.calls_rules(&chosen(turn), most_calls(turn)));
                let both = format!("start: answer | {opening} calls\n{answer}{calls}");
                Phase::Json(self.compile(&both).map_err(in_schema)?)
            } else {
                Phase::Json(alone)
            }
        } else {
            Phase::Text { calls: if may_call { Some(self.calls(turn)?) } else { None }, said: false }
        };
        let vocabulary = &self.model.vocabulary;
        let opening = if forced && may_call { vocabulary.encode(syntax.opening)? } else { Vec::new() };
        if opening.len() >= max_tokens {
            return Err(Error::invalid("max_tokens", "too few tokens for the tool call that tool_choice asks for"));
        }
        let token = |text: &str| vocabulary.token_of(text.as_bytes());
        let has_calls = turn.messages.iter().any(|message| matches!(message, Message::Tool { .. }));
        let mut text = InString::default();
        text.take(syntax.opening.as_bytes());
        let guide = TurnGuide {
            model: self.model.clone(),
            phase,
            opening: (has_calls || !turn.tools.is_empty()).then_some(syntax.opening),
            speaks,
            quote: token("\""),
            closers: ["}", "]", ",", "\""].into_iter().filter_map(token).collect(),
            in_string: if matches!(self.form, Form::Llama3) { text } else { InString::default() },
            stops: turn.sampling.stop.iter().map(|s| s.as_bytes().to_vec()).collect(),
            tail: Vec::new(),
            used: 0,
            left: max_tokens - opening.len(),
            weighs: false,
        };
        Ok(Plan { guide, opening })
    }

    /// Checks that every tool's schema can be used.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the first tool whose schema cannot be.
    pub fn check_tools(&self, tools: &[Tool]) -> Result<(), Error> {
        let check = |(at, tool): (usize, &Tool)| self.check(&tool.parameters).map_err(|why| unusable(at, tool, &why));
        tools.iter().enumerate().try_for_each(check)
    }

    /// What may follow the opening of a call.
    fn calls(&self, turn: &Turn) -> Result<Matcher, Error> {
        let chosen = chosen(turn);
        let compile =
            |tools: &[(usize, &Tool)], most| self.compile(&format!("start: calls\n{}", self.calls_rules(tools, most)));
        for (at, tool) in &chosen {
            self.check(&tool.parameters).map_err(|why| unusable(*at, tool, &why))?;
        }
        compile(&chosen, most_calls(turn)).map_err(|why| {
            // The grammar of all tools does not say which one is at fault.
            let fault = chosen.iter().find_map(|(at, tool)| Some((*at, *tool, compile(&[(*at, *tool)], 1).err()?)));
            match fault {
                Some((at, tool, why)) => unusable(at, tool, &why),
                None => Error::invalid("tools", format!("The schemas cannot be used together: {why}")),
            }
        })
    }

    /// Whether arguments can be written under a schema at all.
    fn check(&self, parameters: &Value) -> Result<(), String> {
        if let Some(kind) = parameters.get("type").filter(|kind| *kind != "object") {
            return Err(format!("arguments are an object, so its type has to be object, not {kind}"));
        }
        self.compile(&format!("start: %json {}\n", compact(arguments_schema(parameters)))).map(drop)
    }

    /// The rule `calls` of these tools and what it needs.
    fn calls_rules(&self, tools: &[(usize, &Tool)], most: usize) -> String {
        let syntax = self.form.syntax();
        let mut rules = String::new();
        let mut names = Vec::new();
        for (i, tool) in tools {
            let name = self.literal(&format!("{}{}", tool.name, syntax.after_name));
            let after = self.literal(syntax.after_arguments);
            rules.push_str(&format!("call{i}: {name} arguments{i} {after}\n"));
            rules.push_str(&format!("arguments{i}: %json {}\n", compact(arguments_schema(&tool.parameters))));
            names.push(format!("call{i}"));
        }
        let (before, separator) = (self.literal(syntax.before_name), self.literal(syntax.separator));
        let more = if most > 1 { format!("({separator} call){{0,{}}}", most - 1) } else { String::new() };
        let closing = self.literal(syntax.closing);
        format!("calls: {before} call {more} {closing}\ncall: {}\n{rules}", names.join(" | "))
    }

    /// A fixed text as the grammar spells it.
    fn literal(&self, text: &str) -> String {
        let spelled = pieces(text, &self.model.vocabulary).into_iter().map(|piece| match piece {
            Piece::Text(text) => Value::from(text).to_string(),
            Piece::Special(id) => format!("<[{id}]>"),
        });
        spelled.collect::<Vec<_>>().join(" ")
    }

    fn compile(&self, lark: &str) -> Result<Matcher, String> {
        let mut hasher = DefaultHasher::new();
        lark.hash(&mut hasher);
        let key = hasher.finish();
        if let Some((_, matcher)) = self.lock().iter().find(|(kept, _)| *kept == key) {
            return Ok(matcher.deep_clone());
        }
        let parser = self.factory.create_parser(TopLevelGrammar::from_lark(lark.to_owned()));
        let matcher = Matcher::new(Ok(parser.map_err(|e| readable(&e.to_string()))?));
        self.try_out(matcher.deep_clone())?;
        let mut kept = self.lock();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((key, matcher.deep_clone()));
        Ok(matcher)
    }

    /// Follows a grammar for a few tokens: some compile, and then allow nothing or never come to an end.
    fn try_out(&self, mut matcher: Matcher) -> Result<(), String> {
        const STEPS: usize = 12;
        for _ in 0..STEPS {
            let mask = matcher.compute_mask_or_eos().map_err(|e| readable(&e.to_string()))?;
            let ends = self.model.vocabulary.end_of_turn();
            let token = mask.first_bit_set().ok_or("nothing is valid under it")? as u32;
            if ends.iter().any(|end| mask.is_allowed(*end)) {
                break;
            }
            matcher.consume_token(token).map_err(|e| readable(&e.to_string()))?;
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<(u64, Matcher)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tools that this turn may call, each with its position among all.
fn chosen(turn: &Turn) -> Vec<(usize, &Tool)> {
    let named = |tool: &Tool| !matches!(&turn.tool_choice, ToolChoice::Named(name) if *name != tool.name);
    turn.tools.iter().enumerate().filter(|(_, tool)| named(tool)).collect()
}

fn most_calls(turn: &Turn) -> usize {
    if turn.parallel_tool_calls { MOST_CALLS } else { 1 }
}

/// The spacing that models know from their training.
fn compact(mut schema: Value) -> String {
    if let Value::Object(map) = &mut schema {
        map.insert(
            "x-guidance".into(),
            json!({"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": false,
                   // Keywords that cannot be kept to, such as `not` or `uniqueItems`, are passed over.
                   "lenient": true}),
        );
    }
    schema.to_string()
}

/// A tool's schema, as narrow as it can be without refusing what its author meant: an object, with the declared
/// properties only unless it says otherwise.
fn arguments_schema(parameters: &Value) -> Value {
    let mut schema = match parameters {
        Value::Object(map) if !map.is_empty() => parameters.clone(),
        _ => json!({"properties": {}}),
    };
    if let Value::Object(map) = &mut schema {
        map.entry("type").or_insert("object".into());
    }
    close_objects(&mut schema);
    schema
}

/// Adds `additionalProperties: false` to every object that lists its properties and does not speak of others.
fn close_objects(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if map.get("properties").is_some_and(Value::is_object)
                && ![
                    "additionalProperties",
                    "patternProperties",
                    "unevaluatedProperties",
                    "allOf",
                    "anyOf",
                    "oneOf",
                    "$ref",
                ]
                .iter()
                .any(|key| map.contains_key(*key))
            {
                map.insert("additionalProperties".into(), false.into());
            }
            for (key, value) in map.iter_mut() {
                match (key.as_str(), value) {
                    ("properties" | "$defs" | "definitions" | "patternProperties", Value::Object(children)) => {
                        children.values_mut().for_each(close_objects);
                    }
                    ("items" | "additionalProperties" | "anyOf" | "oneOf" | "prefixItems", child) => {
                        close_objects(child);
                    }
                    _ => {}
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close_objects),
        _ => {}
    }
}

fn unusable(at: usize, tool: &Tool, why: &str) -> Error {
    let path = ["tools".into(), at.into(), "function".into(), "parameters".into()];
    Error::Invalid(vec![Fault::new(path, format!("The schema of `{}` cannot be used: {why}", tool.name))])
}

/// A fault of llguidance for the author of a schema: one line, without places in our grammar or the state of a parser.
fn readable(text: &str) -> String {
    const LONGEST: usize = 300;
    let text = text.split("<state>").next().unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let line = lines.join(" ");
    let line = match line.split_once(": ") {
        Some((place, rest)) if place.starts_with("at ") => rest,
        _ => &line,
    };
    line.chars().take(LONGEST).collect()
}

/// Whether a JSON text is inside a string.
#[derive(Clone, Copy, Debug, Default)]
struct InString {
    open: bool,
    escaped: bool,
}

impl InString {
    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.open => self.escaped = true,
                b'"' => self.open = !self.open,
                _ => {}
            }
        }
    }
}

/// Steers one turn. See [`Guide`].
pub struct TurnGuide {
    model: Arc<ModelInfo>,
    phase: Phase,
    /// The opening of a call, when there are tools.
    opening: Option<&'static str>,
    /// Whether a call may follow text.
    speaks: bool,
    /// Ends a string.
    quote: Option<u32>,
    /// Tokens that lead to the end of a JSON text from outside a string, in the order in which they are tried.
    closers: Vec<u32>,
    /// Where the grammar's text is.
    in_string: InString,
    stops: Vec<Vec<u8>>,
    /// The last bytes of the text, for openings and stop texts that span tokens.
    tail: Vec<u8>,
    /// Tokens since the grammar took over.
    used: usize,
    left: usize,
    /// Whether the odds of calls are told.
    weighs: bool,
}

enum Phase {
    /// Free text, until a call opens.
    Text {
        /// What follows an opening; without it, none may come.
        calls: Option<Matcher>,
        /// Whether something other than white space was said.
        said: bool,
    },
    /// A JSON answer, or calls in its place.
    Json(Matcher),
    /// Inside the calls.
    Calls(Matcher),
}

// === impl TurnGuide ===

impl TurnGuide {
    /// Has the odds of calls told.
    pub fn weigh(&mut self) {
        self.weighs = true;
    }

    /// Another guide that stands where this one does.
    pub fn deep_clone(&self) -> Self {
        let phase = match &self.phase {
            Phase::Text { calls, said } => Phase::Text { calls: calls.as_ref().map(Matcher::deep_clone), said: *said },
            Phase::Json(matcher) => Phase::Json(matcher.deep_clone()),
            Phase::Calls(matcher) => Phase::Calls(matcher.deep_clone()),
        };
        Self {
            model: self.model.clone(),
            phase,
            closers: self.closers.clone(),
            stops: self.stops.clone(),
            tail: self.tail.clone(),
            ..*self
        }
    }

    /// Where an opening is complete in the text so far plus this token: `Some(true)` when it ends with the token,
    /// `Some(false)` when the token goes on behind it.
    fn opens(&self, bytes: &[u8]) -> Option<bool> {
        let wanted = self.opening?.as_bytes();
        let keep = self.tail.len().min(wanted.len() - 1);
        let mut text = self.tail[self.tail.len() - keep..].to_vec();
        text.extend_from_slice(bytes);
        let at = text.windows(wanted.len()).position(|window| window == wanted)?;
        Some(at + wanted.len() == text.len())
    }

    /// Whether the text would hold something like call syntax that is none.
    fn imitates(&self, bytes: &[u8], may_open: bool) -> bool {
        let Some(opening) = self.opening.filter(|opening| opening.starts_with(NEVER_SPOKEN[0])) else { return false };
        let text: Vec<u8> = self.tail.iter().chain(bytes).copied().collect();
        let found = NEVER_SPOKEN
            .iter()
            .flat_map(|wanted| (0..text.len()).filter(|at| text[*at..].starts_with(wanted.as_bytes())));
        found.map(|at| &text[at..]).any(|rest| {
            let opens = opening.as_bytes().starts_with(rest) || rest.starts_with(opening.as_bytes());
            !(may_open && opens)
        })
    }

    /// The bytes that a token adds to the text: none for control tokens, but for the opening of a call.
    fn text_of(&self, token: u32) -> &[u8] {
        let vocabulary = &self.model.vocabulary;
        let bytes = vocabulary.bytes(token);
        let hidden = vocabulary.is_special(token) && self.opening.is_none_or(|opening| opening.as_bytes() != bytes);
        if hidden { &[] } else { bytes }
    }

    /// Whether a stop text is complete, now that these bytes came.
    fn stopped_by(&mut self, bytes: &[u8]) -> bool {
        let longest = self.stops.iter().map(Vec::len).max().unwrap_or(0);
        let longest = longest.max(self.opening.map_or(0, |opening| opening.len() + NEVER_SPOKEN[1].len()));
        let from = self.tail.len().saturating_sub(longest);
        self.tail.drain(..from);
        self.tail.extend_from_slice(bytes);
        self.stops.iter().any(|stop| {
            // Only what ends in the new bytes: older text was searched before.
            let start = self.tail.len().saturating_sub(bytes.len() + stop.len() - 1);
            self.tail[start..].windows(stop.len()).any(|window| window == stop)
        })
    }
}

impl Guide for TurnGuide {
    fn allowed(&mut self) -> Result<Option<SimpleVob>, String> {
        let (matcher, closing) = match &mut self.phase {
            Phase::Text { .. } => return Ok(None),
            Phase::Json(matcher) => (matcher, self.used >= JSON_LIMIT),
            Phase::Calls(matcher) => (matcher, self.used >= CALL_LIMIT || self.left <= CALL_RESERVE),
        };
        let mut mask = matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
        if closing {
            // Time to come to an end: one token that leads there, where the grammar has one here.
            let ends = self.model.vocabulary.end_of_turn();
            let quote = self.quote.filter(|_| !self.in_string.escaped);
            let closer = if self.in_string.open {
                quote.filter(|quote| mask.is_allowed(*quote))
            } else {
                ends.iter().chain(&self.closers).copied().find(|closer| mask.is_allowed(*closer))
            };
            if let Some(closer) = closer {
                mask.set_all(false);
                mask.allow_token(closer);
            }
        }
        Ok(Some(mask))
    }

    fn vetoes(&self, token: u32) -> bool {
        let Phase::Text { calls, said } = &self.phase else { return false };
        let bytes = self.text_of(token);
        let may_open = calls.is_some() && (self.speaks || !said);
        if self.imitates(bytes, may_open) {
            return true;
        }
        match self.opens(bytes) {
            None => false,
            // The grammar takes over right behind the opening, so that a token must end there.
            Some(ends_with_token) => !(ends_with_token && may_open),
        }
    }

    fn weighs(&self) -> bool {
        self.weighs && matches!(self.phase, Phase::Calls(_))
    }

    fn commit(&mut self, token: u32) -> Result<Flow, String> {
        self.left = self.left.saturating_sub(1);
        let bytes = self.text_of(token).to_vec();
        let opened = self.opens(&bytes) == Some(true);
        match &mut self.phase {
            Phase::Text { calls, said } => {
                if opened && let Some(matcher) = calls.take() {
                    self.phase = Phase::Calls(matcher);
                    return Ok(Flow::Continue);
                }
                // What can still become an opening is not said yet.
                let opening = self.opening.unwrap_or_default().as_bytes();
                let pending = self.tail.iter().chain(&bytes).copied().collect::<Vec<u8>>();
                let pending = pending.trim_ascii_start();
                *said |= !pending.is_empty() && !opening.starts_with(pending);
                Ok(if self.stopped_by(&bytes) { Flow::Stop } else { Flow::Continue })
            }
            Phase::Json(matcher) => {
                self.used += 1;
                self.in_string.take(&bytes);
                matcher.consume_token(token).map_err(|e| e.to_string())?;
                let complete = matcher.is_stopped();
                Ok(if complete || self.stopped_by(&bytes) { Flow::Stop } else { Flow::Continue })
            }
            Phase::Calls(matcher) => {
                self.used += 1;
                self.in_string.take(&bytes);
                matcher.consume_token(token).map_err(|e| e.to_string())?;
                Ok(if matcher.is_stopped() { Flow::Stop } else { Flow::Continue })
            }
        }
    }
}
