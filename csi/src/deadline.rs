//! How long a call may take: until shortly before its caller gives up, or until this process is asked to end.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;

use crate::limits;

/// The end of a call's patience.
#[derive(Clone, Debug)]
pub struct Deadline {
    at: Instant,
    shutdown: CancellationToken,
}

impl Deadline {
    /// From the `grpc-timeout` that the caller sent, or `otherwise` from now.
    pub fn of(metadata: &MetadataMap, otherwise: Duration, shutdown: &CancellationToken) -> Deadline {
        let patience = match metadata.get("grpc-timeout").and_then(|v| v.to_str().ok()).and_then(parse_timeout) {
            Some(timeout) => timeout.saturating_sub(limits::ANSWER_BEFORE_DEADLINE.min(timeout / 10)),
            None => otherwise,
        };
        Deadline::after(patience, shutdown)
    }

    /// That long from now.
    pub fn after(patience: Duration, shutdown: &CancellationToken) -> Deadline {
        // A day is beyond every caller's patience and far from the clock's end.
        Deadline { at: Instant::now() + patience.min(Duration::from_secs(86_400)), shutdown: shutdown.clone() }
    }

    /// This deadline, or that long from now, whichever comes first.
    pub fn capped(&self, patience: Duration) -> Deadline {
        Deadline { at: self.at.min(Instant::now() + patience), shutdown: self.shutdown.clone() }
    }

    /// Waits until it has come.
    pub async fn passed(&self) {
        tokio::select! {
            () = tokio::time::sleep_until(self.at) => {}
            () = self.shutdown.cancelled() => {}
        }
    }
}

/// The gRPC form: up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_form_of_grpc() {
        for (text, wanted) in [
            ("110S", Some(110_000)),
            ("1500m", Some(1500)),
            ("2M", Some(120_000)),
            ("", None),
            ("S", None),
            ("-1S", None),
            ("123456789S", None),
            ("1X", None),
            ("1ä", None),
        ] {
            assert_eq!(parse_timeout(text), wanted.map(Duration::from_millis), "{text}");
        }
    }

    #[test]
    fn answers_shortly_before_the_caller_gives_up() {
        let patience = |timeout: Option<&'static str>| {
            let mut metadata = MetadataMap::new();
            if let Some(timeout) = timeout {
                metadata.insert("grpc-timeout", timeout.parse().unwrap());
            }
            let before = Instant::now();
            let deadline = Deadline::of(&metadata, Duration::from_secs(99), &CancellationToken::new());
            (deadline.at - before).as_secs()
        };
        assert_eq!((patience(Some("30S")), patience(None), patience(Some("nonsense"))), (29, 99, 99));
    }
}
