//! News of an object: what becomes a Kubernetes event.

/// Whether it is good or bad news.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Normal,
    Warning,
}

impl Mood {
    /// The `type` of a Kubernetes event.
    pub fn as_str(self) -> &'static str {
        match self {
            Mood::Normal => "Normal",
            Mood::Warning => "Warning",
        }
    }
}

/// One thing that a user must know about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    pub mood: Mood,
    /// PascalCase, one word for one cause.
    pub reason: String,
    /// The part of the object that this is about, such as a disk; empty: all of it. News of one reason and part are counted.
    pub part: String,
    /// A sentence; of news that are counted, the last one stands.
    pub message: String,
}

impl News {
    /// Good news of a whole object.
    pub fn normal(reason: &str, message: impl Into<String>) -> News {
        News { mood: Mood::Normal, reason: reason.into(), part: String::new(), message: message.into() }
    }

    /// Bad news of a whole object.
    pub fn warning(reason: &str, message: impl Into<String>) -> News {
        News { mood: Mood::Warning, ..News::normal(reason, message) }
    }

    /// The same of one part.
    pub fn of_part(self, part: &str) -> News {
        News { part: part.into(), ..self }
    }
}
