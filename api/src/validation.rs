//! What a user may write: defaults are filled in and mistakes are found before an object is stored.
//!
//! Pure functions, used by the HTTP API and by the admission webhook. One request reports all of its mistakes at once.
//! Message texts that Longhorn's users and tests know are kept word for word.

pub mod claim;
pub mod image;
mod nearest;
pub mod node;
pub mod setting;
pub mod url;
pub mod volume;

pub use nearest::nearest;

use std::fmt;

use crate::ErrorKind;

/// One field that cannot stay as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// `spec.checksum`; a map's key in brackets.
    pub field: String,
    /// What was given, without secrets; empty when nothing was.
    pub value: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Enough to recognize it; a value may be a whole file that was pasted.
        const SHOWN: usize = 160;
        match self.value.char_indices().nth(SHOWN) {
            _ if self.value.is_empty() => write!(f, "{}: {}", self.field, self.message),
            Some((end, _)) => write!(f, "{} is `{}…`: {}", self.field, &self.value[..end], self.message),
            None => write!(f, "{} is `{}`: {}", self.field, self.value, self.message),
        }
    }
}

/// Every mistake of a request; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldErrors(Vec<FieldError>);

impl FieldErrors {
    /// The mistakes, in the order of the fields.
    pub fn errors(&self) -> &[FieldError] {
        &self.0
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Invalid
    }
}

impl fmt::Display for FieldErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "; " })?;
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for FieldErrors {}

/// Collects mistakes.
#[derive(Default)]
struct Mistakes(Vec<FieldError>);

impl Mistakes {
    fn add(&mut self, field: impl Into<String>, value: impl Into<String>, message: impl Into<String>) {
        self.0.push(FieldError { field: field.into(), value: value.into(), message: message.into() });
    }

    /// Whether a field whose name begins so was found wrong.
    fn has(&self, field: &str) -> bool {
        self.0.iter().any(|error| error.field.starts_with(field))
    }

    /// A field that may not change once it has a value.
    fn refuse_change<T: PartialEq + fmt::Display>(&mut self, field: &str, old: &T, new: &T) {
        if old != new {
            self.add(field, new.to_string(), format!("it cannot be changed, and was `{old}`"));
        }
    }

    /// Tags as a selector or on a node or disk: words.
    fn check_tags(&mut self, field: &str, tags: &[String]) {
        for tag in tags {
            if tag.is_empty() || tag.chars().any(|c| c.is_whitespace() || c == ',' || c == ';') {
                self.add(field, tag, "a tag is a word without blanks, commas and semicolons");
            }
        }
    }

    fn result(self) -> Result<(), FieldErrors> {
        if self.0.is_empty() { Ok(()) } else { Err(FieldErrors(self.0)) }
    }
}

/// Longhorn labels objects with names of others, so such a name must also be a label's value.
const LABEL_RULE: &str =
    "at most 63 characters that end with a letter or digit, as it becomes a label of other objects";

fn fits_label(name: &str) -> bool {
    name.len() <= 63 && name.bytes().last().is_some_and(|b| b.is_ascii_alphanumeric())
}
