//! Reads fields of a JSON body and collects every fault, so that a client learns of all at once.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::{Error, Fault, PathPart};

/// The faults found so far.
#[derive(Default)]
pub(super) struct Faults(Vec<Fault>);

/// An object of the body, and where it stands.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: Vec<PathPart>,
}

// === impl Faults ===

impl Faults {
    pub(super) fn add(&mut self, path: Vec<PathPart>, message: impl Into<String>) {
        // A body can hold thousands of faults; a person reads a few.
        const MOST: usize = 32;
        if self.0.len() < MOST {
            self.0.push(Fault::new(path, message));
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The error that tells them.
    pub(super) fn into_error(self) -> Error {
        Error::Invalid(self.0)
    }

    /// The value, if no fault was found.
    pub(super) fn or<T>(self, value: T) -> Result<T, Error> {
        if self.0.is_empty() { Ok(value) } else { Err(Error::Invalid(self.0)) }
    }
}

// === impl Fields ===

impl<'a> Fields<'a> {
    /// The fields of an object; a fault when the value is none.
    pub(super) fn of(value: &'a Value, path: Vec<PathPart>, faults: &mut Faults) -> Option<Self> {
        match value {
            Value::Object(map) => Some(Self { map, path }),
            other => {
                faults.add(path, format!("has to be an object, not {}", kind(other)));
                None
            }
        }
    }

    /// A field's path.
    pub(super) fn at(&self, name: &'static str) -> Vec<PathPart> {
        self.path.iter().cloned().chain([name.into()]).collect()
    }

    /// A field's path, for a name that the client made up.
    pub(super) fn at_any(&self, name: &str) -> Vec<PathPart> {
        self.path.iter().cloned().chain([name.to_owned().into()]).collect()
    }

    /// The names of all fields that are there and not null.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str())
    }

    /// Whether a field says nothing: an empty list or object.
    pub(super) fn is_empty(&self, name: &str) -> bool {
        match self.map.get(name) {
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            _ => false,
        }
    }

    /// A field that is there and not null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, name: &'static str, faults: &mut Faults) -> Option<&'a str> {
        let value = self.get(name)?;
        if value.as_str().is_none() {
            faults.add(self.at(name), format!("{name} has to be a string, not {}", kind(value)));
        }
        value.as_str()
    }

    pub(super) fn required_text(&self, name: &'static str, faults: &mut Faults) -> Option<&'a str> {
        if self.get(name).is_none() {
            faults.add(self.at(name), format!("{name} is required"));
        }
        self.text(name, faults)
    }

    pub(super) fn flag(&self, name: &'static str, faults: &mut Faults) -> Option<bool> {
        let value = self.get(name)?;
        if value.as_bool().is_none() {
            faults.add(self.at(name), format!("{name} has to be true or false, not {}", kind(value)));
        }
        value.as_bool()
    }

    pub(super) fn number(&self, name: &'static str, range: RangeInclusive<f64>, faults: &mut Faults) -> Option<f64> {
        let value = self.get(name)?;
        match value.as_f64() {
            Some(number) if range.contains(&number) => Some(number),
            _ => {
                let (low, high) = (range.start(), range.end());
                faults.add(
                    self.at(name),
                    format!("{name} has to be a number from {low} to {high}, not {}", shown(value)),
                );
                None
            }
        }
    }

    pub(super) fn whole(&self, name: &'static str, range: RangeInclusive<i64>, faults: &mut Faults) -> Option<i64> {
        let value = self.get(name)?;
        // JSON has one kind of number: 7.0 is whole.
        let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64);
        match value.as_i64().or_else(|| whole(value.as_f64()?)) {
            Some(number) if range.contains(&number) => Some(number),
            _ => {
                let allowed = match (*range.start(), *range.end()) {
                    (i64::MIN, _) => "a whole number".to_owned(),
                    (low, i64::MAX) => format!("a whole number from {low}"),
                    (low, high) => format!("a whole number from {low} to {high}"),
                };
                faults.add(self.at(name), format!("{name} has to be {allowed}, not {}", shown(value)));
                None
            }
        }
    }

    pub(super) fn list(&self, name: &'static str, faults: &mut Faults) -> Option<&'a [Value]> {
        let value = self.get(name)?;
        if !value.is_array() {
            faults.add(self.at(name), format!("{name} has to be a list, not {}", kind(value)));
        }
        value.as_array().map(Vec::as_slice)
    }
}

/// A value's type, as JSON names it.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A value for an error text: whole when it is short.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 40 { text } else { kind(value).to_owned() }
}
