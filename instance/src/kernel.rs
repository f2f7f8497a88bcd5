//! What this node's kernel can do for engines, for the Node object.

use api::names::condition::ENGINE_REPLACEMENT;
use api::{Condition, ConditionStatus};
use engine::fuse::probe;
use tracing::warn;

use crate::role::Config;

const HINT: &str =
    "after an engine died, unmount its volume and mount it again; a kernel from Linux 6.9 makes that unnecessary";

/// Whether an engine that dies is replaced under its users: asked of the kernel, which says it at a mount.
pub async fn engine_replacement(config: &Config) -> Condition {
    let (file, wished) = (config.directory.join("fuse-probe"), config.engines.replace);
    let asked = tokio::task::spawn_blocking(move || probe::repeats_requests(&file)).await;
    let asked = asked.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
    let condition = judge(wished, asked);
    if !condition.is_true() {
        warn!(node = %config.node, reason = condition.message, "engines that die are not replaced");
    }
    condition
}

fn judge(wished: bool, asked: std::io::Result<bool>) -> Condition {
    let no =
        |reason: &str, message: String| Condition::new(ENGINE_REPLACEMENT, ConditionStatus::False, reason, message);
    match asked {
        Err(error) => no("NoFuse", format!("FUSE cannot be used: {error}; volumes cannot be attached here"))
            .with_hint("load the kernel module fuse, and give the driver /dev/fuse and the right to mount"),
        Ok(_) if !wished => no(
            "SwitchedOff",
            "engines that die are not replaced under their users, as configured: their volumes fail until they are attached again".into(),
        )
        .with_hint(HINT),
        Ok(false) => no(
            "KernelTooOld",
            "this kernel cannot repeat requests that an engine had taken (that takes Linux 6.9): when an engine dies, its volume fails until it is attached again".into(),
        )
        .with_hint(HINT),
        Ok(true) => Condition::new(ENGINE_REPLACEMENT, ConditionStatus::True, "Supported", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_happens_when_an_engine_dies() {
        let check = |wished, asked, reason: &str, word: &str| {
            let condition = judge(wished, asked);
            assert_eq!((condition.reason.as_str(), condition.is_true()), (reason, reason == "Supported"));
            assert!(condition.message.contains(word), "{condition:?}");
        };
        check(true, Ok(true), "Supported", "");
        check(true, Ok(false), "KernelTooOld", "Linux 6.9");
        check(false, Ok(true), "SwitchedOff", "as configured");
        check(true, Err(std::io::ErrorKind::NotFound.into()), "NoFuse", "cannot be attached");
    }
}
