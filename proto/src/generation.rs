//! What a replica does with a control request: its rules about generations (`ARCHITECTURE.md`, "Generations") as a pure plan.
//!
//! The replica process and the simulation carry out the same plans, step by step, so that an end between two steps means the
//! same in both. The answer follows the last step.

use crate::replica::{Record, Request};

/// One step of a plan. When it fails, the rest is left undone and the request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// End the export that serves now, with every request on it: a new writer is let in only after that (invariant 4).
    EndExport,
    /// Bring everything that was written to stable storage.
    Flush,
    /// Replace the record, durably: invariant 5 rests on it.
    Record(Record),
    /// Open this export, for one connection.
    AddExport(String),
}

/// What to do about a request, in this order; `export` is the one that serves now.
///
/// # Errors
/// A sentence when nothing is to be changed.
pub fn plan(record: &Record, export: Option<&str>, request: &Request) -> Result<Vec<Step>, String> {
    match request {
        Request::Status => Ok(vec![]),
        Request::Open { generation, members, seen } => open(record, export, *generation, members, *seen),
        Request::Fence { generation, members, export: asked } => fence(record, export, *generation, members, asked),
        Request::Close { generation } => close(record, export, *generation),
    }
}

fn open(
    record: &Record,
    export: Option<&str>,
    generation: u64,
    members: &[String],
    seen: Option<u64>,
) -> Result<Vec<Step>, String> {
    let raised = raise(record, generation, members)?;
    // Whoever raised it meanwhile may have dropped members that this engine counts on, and acknowledged without them.
    if let Some(seen) = seen.filter(|seen| *seen != record.generation) {
        return Err(format!(
            "replica `{}` is at generation {} now and not at {seen}, where it was when the engine chose its members; it must choose anew",
            record.replica, record.generation
        ));
    }
    let opened = Step::AddExport(format!("{}-{generation}", record.volume));
    Ok(export.map(|_| Step::EndExport).into_iter().chain([Step::Record(raised), opened]).collect())
}

fn fence(
    record: &Record,
    export: Option<&str>,
    generation: u64,
    members: &[String],
    asked: &str,
) -> Result<Vec<Step>, String> {
    let raised = raise(record, generation, members)?;
    match export {
        // It missed writes since its export ended, so it must not count as a member.
        None => Err(format!("replica `{}` has no open export and cannot stay in sync", record.replica)),
        // An engine that lost this replica to another one knows nothing of the writes since.
        Some(open) if open != asked => Err(format!(
            "replica `{}` serves export `{open}` now, for another engine than that of `{asked}`",
            record.replica
        )),
        Some(_) => Ok(vec![Step::Record(raised)]),
    }
}

fn close(record: &Record, export: Option<&str>, generation: u64) -> Result<Vec<Step>, String> {
    if generation != record.generation {
        return Err(format!(
            "replica `{}` is at generation {} and cannot end generation {generation}",
            record.replica, record.generation
        ));
    }
    match export {
        Some(_) => Ok(vec![Step::EndExport, Step::Flush, Step::Record(Record { clean: true, ..record.clone() })]),
        // Repeated after a lost answer.
        None if record.clean => Ok(vec![]),
        None => Err(format!(
            "replica `{}` was restarted within generation {generation} and may miss writes; it did not end cleanly",
            record.replica
        )),
    }
}

/// A generation only rises, and a replica takes part only in one that names it.
fn raise(record: &Record, generation: u64, members: &[String]) -> Result<Record, String> {
    if generation <= record.generation {
        return Err(format!(
            "replica `{}` has recorded generation {}; generation {generation} is not above it",
            record.replica, record.generation
        ));
    }
    if !members.contains(&record.replica) {
        return Err(format!("replica `{}` is not a member of generation {generation}", record.replica));
    }
    Ok(Record { generation, members: members.to_vec(), clean: false, ..record.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(clean: bool) -> Record {
        Record { volume: "v".into(), replica: "r1".into(), generation: 5, clean, ..Default::default() }
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    fn refusal(record: &Record, export: Option<&str>, request: &Request) -> String {
        plan(record, export, request).unwrap_err()
    }

    #[test]
    fn a_generation_only_rises_and_names_its_members() {
        let open = |generation, members: &[&str]| Request::Open { generation, members: names(members), seen: None };
        let raised = Record { generation: 6, members: names(&["r1", "r2"]), ..record(false) };
        let fresh = [Step::Record(raised.clone()), Step::AddExport("v-6".into())];
        assert_eq!(plan(&record(true), None, &open(6, &["r1", "r2"])).unwrap(), fresh);
        let again = [Step::EndExport, Step::Record(raised), Step::AddExport("v-6".into())];
        assert_eq!(plan(&record(false), Some("v-5"), &open(6, &["r1", "r2"])).unwrap(), again);
        assert!(refusal(&record(true), None, &open(5, &["r1"])).contains("generation 5 is not above"));
        assert!(refusal(&record(true), None, &open(4, &["r1"])).contains("generation 4 is not above"));
        assert!(refusal(&record(true), None, &open(6, &["r2"])).contains("not a member"));
    }

    #[test]
    fn an_engine_that_chose_by_an_outdated_record_is_refused() {
        let open = |seen| Request::Open { generation: 9, members: names(&["r1"]), seen };
        assert!(refusal(&record(false), Some("v-5"), &open(Some(4))).contains("at generation 5 now and not at 4"));
        // Also when it was lost and made anew meanwhile.
        assert!(refusal(&record(true), None, &open(Some(6))).contains("must choose anew"));
        assert!(plan(&record(false), Some("v-5"), &open(Some(5))).is_ok());
        // An engine of an older version does not say.
        assert!(plan(&record(false), None, &open(None)).is_ok());
    }

    #[test]
    fn a_fence_needs_the_export_of_its_own_engine() {
        let fence = Request::Fence { generation: 6, members: names(&["r1"]), export: "v-5".into() };
        let raised = Record { generation: 6, members: names(&["r1"]), ..record(false) };
        assert_eq!(plan(&record(false), Some("v-5"), &fence).unwrap(), [Step::Record(raised)]);
        assert!(refusal(&record(false), None, &fence).contains("no open export"));
        assert!(refusal(&record(false), Some("v-7"), &fence).contains("for another engine"));
    }

    #[test]
    fn only_a_generation_that_still_serves_ends_cleanly() {
        let close = |generation| Request::Close { generation };
        let steps = [Step::EndExport, Step::Flush, Step::Record(record(true))];
        assert_eq!(plan(&record(false), Some("v-5"), &close(5)).unwrap(), steps);
        assert_eq!(plan(&record(true), None, &close(5)).unwrap(), []);
        assert!(refusal(&record(false), None, &close(5)).contains("restarted"));
        assert!(refusal(&record(false), Some("v-5"), &close(4)).contains("cannot end generation 4"));
    }
}
