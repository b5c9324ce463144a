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
    engine::{Flow, Guide, ModelInfo},
    error::{Error, Fault},
    turn::{OutputFormat, Tool, ToolChoice, Turn},
};

/// Most calls in one turn.
const MOST_CALLS: usize = 8;

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
    /// Text that the answer has to begin with. It is computed as part of the prompt, which is faster than generating it.
    pub opening: Option<&'static str>,
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
        Ok(Self {
            model,
            factory,
            form,
            kept: Mutex::new(VecDeque::new()),
        })
    }

    /// The guide of a turn. `speaks` says whether text may come before a call.
    ///
    /// # Errors
    /// [`Error::Invalid`], naming the tool or the format whose schema cannot be compiled.
    pub fn plan(&self, turn: &Turn, speaks: bool, max_tokens: usize) -> Result<Plan, Error> {
        let syntax = self.form.syntax();
        let forced = matches!(turn.tool_choice, ToolChoice::Required | ToolChoice::Named(_));
        let may_call = !turn.tools.is_empty() && turn.tool_choice != ToolChoice::None;
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
                let (opening, calls) = (
                    self.literal(syntax.opening),
                    self.calls_rules(&chosen(turn), most_calls(turn)),
                );
                let both = format!("start: answer | {opening} calls\n{answer}{calls}");
                Phase::Json(self.compile(&both).map_err(in_schema)?)
            } else {
                Phase::Json(alone)
            }
        } else {
            Phase::Text {
                calls: if may_call { Some(self.calls(turn)?) } else { None },
                said: false,
            }
        };
        let vocabulary = &self.model.vocabulary;
        let closers = ["}", "]", "\"", ","]
            .iter()
            .filter_map(|text| vocabulary.token_of(text.as_bytes()))
            .collect();
        let guide = TurnGuide {
            model: self.model.clone(),
            phase,
            opening: (!turn.tools.is_empty()).then_some(syntax.opening),
            speaks,
            closers,
            stops: turn.sampling.stop.iter().map(|s| s.as_bytes().to_vec()).collect(),
            tail: Vec::new(),
            used: 0,
            left: max_tokens,
        };
        Ok(Plan {
            guide,
            opening: (forced && may_call).then_some(syntax.opening),
        })
    }

    /// What may follow the opening of a call.
    fn calls(&self, turn: &Turn) -> Result<Matcher, Error> {
        let chosen = chosen(turn);
        let compile =
            |tools: &[(usize, &Tool)], most| self.compile(&format!("start: calls\n{}", self.calls_rules(tools, most)));
        compile(&chosen, most_calls(turn)).map_err(|why| {
            // The grammar of all tools does not say which one is at fault.
            let faults = chosen.iter().filter_map(|(at, tool)| {
                let fault = compile(&[(*at, *tool)], 1).err()?;
                let path = ["tools".into(), (*at).into(), "function".into(), "parameters".into()];
                Some(Fault::new(
                    path,
                    format!("The schema of `{}` cannot be used: {fault}", tool.name),
                ))
            });
            let mut faults: Vec<Fault> = faults.collect();
            if faults.is_empty() {
                faults.push(Fault::new(
                    ["tools".into()],
                    format!("The schemas cannot be used together: {why}"),
                ));
            }
            Error::Invalid(faults)
        })
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
            rules.push_str(&format!(
                "arguments{i}: %json {}\n",
                compact(arguments_schema(&tool.parameters))
            ));
            names.push(format!("call{i}"));
        }
        let (before, separator) = (self.literal(syntax.before_name), self.literal(syntax.separator));
        let more = if most > 1 {
            format!("({separator} call){{0,{}}}", most - 1)
        } else {
            String::new()
        };
        let closing = self.literal(syntax.closing);
        format!(
            "calls: {before} call {more} {closing}\ncall: {}\n{rules}",
            names.join(" | ")
        )
    }

    /// A fixed text as the grammar spells it.
    fn literal(&self, text: &str) -> String {
        let spelled = pieces(text, &self.model.vocabulary)
            .into_iter()
            .map(|piece| match piece {
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
        let matcher = Matcher::new(Ok(parser.map_err(|e| first_line(&e.to_string()))?));
        let mut kept = self.lock();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back((key, matcher.deep_clone()));
        Ok(matcher)
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
            json!({"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": false}),
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
        let open = ["$ref", "anyOf", "oneOf", "allOf", "type"];
        if !open.iter().any(|key| map.contains_key(*key)) {
            map.insert("type".into(), "object".into());
        }
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

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Steers one turn. See [`Guide`].
pub struct TurnGuide {
    model: Arc<ModelInfo>,
    phase: Phase,
    /// The opening of a call, when there are tools.
    opening: Option<&'static str>,
    /// Whether a call may follow text.
    speaks: bool,
    /// Tokens that lead to the end of a JSON text, in the order in which they are tried.
    closers: Vec<u32>,
    stops: Vec<Vec<u8>>,
    /// The last bytes of the text, for openings and stop texts that span tokens.
    tail: Vec<u8>,
    /// Tokens since the grammar took over.
    used: usize,
    left: usize,
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
    /// Where an opening is complete in the text so far plus this token: `Some(true)` when it ends with the token,
    /// `Some(false)` when the token goes on behind it.
    fn opens(&self, bytes: &[u8]) -> Option<bool> {
        let opening = self.opening?.as_bytes();
        let keep = self.tail.len().min(opening.len() - 1);
        let mut text = self.tail[self.tail.len() - keep..].to_vec();
        text.extend_from_slice(bytes);
        let at = text.windows(opening.len()).position(|window| window == opening)?;
        Some(at + opening.len() == text.len())
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
        let longest = longest.max(self.opening.map_or(0, str::len));
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
        // Time to come to an end: one token that leads there, where the grammar has one here.
        if closing && let Some(closer) = self.closers.iter().find(|closer| mask.is_allowed(**closer)) {
            mask.set_all(false);
            mask.allow_token(*closer);
        }
        Ok(Some(mask))
    }

    fn vetoes(&self, token: u32) -> bool {
        let Phase::Text { calls, said } = &self.phase else {
            return false;
        };
        match self.opens(self.text_of(token)) {
            None => false,
            // The grammar takes over right behind the opening, so that a token must end there.
            Some(ends_with_token) => {
                let allowed = calls.is_some() && (self.speaks || !said);
                !(ends_with_token && allowed)
            }
        }
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
                Ok(if self.stopped_by(&bytes) {
                    Flow::Stop
                } else {
                    Flow::Continue
                })
            }
            Phase::Json(matcher) => {
                self.used += 1;
                matcher.consume_token(token).map_err(|e| e.to_string())?;
                let complete = matcher.is_stopped();
                Ok(if complete || self.stopped_by(&bytes) {
                    Flow::Stop
                } else {
                    Flow::Continue
                })
            }
            Phase::Calls(matcher) => {
                self.used += 1;
                matcher.consume_token(token).map_err(|e| e.to_string())?;
                Ok(if matcher.is_stopped() {
                    Flow::Stop
                } else {
                    Flow::Continue
                })
            }
        }
    }
}
