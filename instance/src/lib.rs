//! Role: supervises one node's data-plane processes, reports its disks.

pub mod replica_process;

/// An error and its causes in one sentence, for statuses and replies.
pub(crate) fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
