//! When to wait for an image is useless: what is written can never succeed, or the source has something else than an image.
//!
//! The controller looks again from time to time all the same, since sources do change.

use api::image::CopyState;
use api::names::condition::READY;
use api::{BackingImage, BackingImageDataSource, ConditionStatus, ErrorKind, condition};
use jiff::Timestamp;
use kube::ResourceExt;
use store::ResourceType;

use super::waiting_for;
use crate::client::Client;

/// Why waiting is useless, if it is.
pub(super) async fn why(
    client: &Client,
    image: &BackingImage,
    namespace: &str,
) -> anyhow::Result<Option<(ErrorKind, String)>> {
    match verdict(image) {
        Some(verdict) if is_about_now(client, image, namespace).await? => Ok(Some(verdict)),
        _ => Ok(None),
    }
}

fn verdict(image: &BackingImage) -> Option<(ErrorKind, String)> {
    let status = image.status.as_ref()?;
    let ready = condition::find(&status.conditions, READY).filter(|c| c.status == ConditionStatus::False)?;
    let kind = match ready.reason.as_str() {
        "Invalid" => ErrorKind::Invalid,
        "Unsupported" => ErrorKind::Unsupported,
        "Lost" => ErrorKind::NotFound,
        "DataSourceFailed" => status
            .disk_file_status_map
            .values()
            .filter(|copy| copy.state == CopyState::Failed && ready.message.contains(&copy.message))
            .find_map(|copy| copy.error_kind.filter(|kind| kind.is_final()))?,
        _ => return None,
    };
    let name = image.name_any();
    Some((kind, format!("image `{name}` cannot become ready: {}", waiting_for(image, Timestamp::now()))))
}

/// Whether what the status says is about what the image asks for now: it may have been corrected a moment ago.
async fn is_about_now(client: &Client, image: &BackingImage, namespace: &str) -> anyhow::Result<bool> {
    let resource = ResourceType::of::<BackingImageDataSource>();
    let source = client.find(&resource, Some(namespace), &image.name_any()).await?;
    let Some(source) = source else { return Ok(true) };
    let source: BackingImageDataSource = serde_json::from_value(source)?;
    // The image's status follows that of its source: a failure that the source tells no more is that of a former attempt.
    let is_failed = source.status.as_ref().is_some_and(|status| status.current_state == CopyState::Failed);
    let conditions = image.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let tells_a_failure = condition::find(conditions, READY).is_some_and(|c| c.reason == "DataSourceFailed");
    Ok(planner::data_source::answers(&source, image) && (is_failed || !tells_a_failure))
}

#[cfg(test)]
mod tests {
    use api::Condition;
    use api::image::DiskFileStatus;

    use super::super::tests::{copy, image};
    use super::*;

    #[test]
    fn waiting_is_useless_only_when_the_failure_is_final() {
        let failed = |reason: &str, kind: Option<ErrorKind>| {
            let ready = Condition::new(READY, ConditionStatus::False, reason, "on node-1: the server answered 404");
            let mut copy = copy(CopyState::Failed, 0, "the server answered 404", "");
            copy.error_kind = kind;
            verdict(&image("one", &[("a", copy)], Some(ready))).map(|(kind, _)| kind)
        };
        assert_eq!(failed("DataSourceFailed", Some(ErrorKind::NotFound)), Some(ErrorKind::NotFound));
        assert_eq!(failed("DataSourceFailed", Some(ErrorKind::Unavailable)), None);
        assert_eq!(failed("DataSourceFailed", None), None);
        assert_eq!(failed("DataSourceRetries", Some(ErrorKind::NotFound)), None);
        assert_eq!(failed("Unsupported", None), Some(ErrorKind::Unsupported));
        assert_eq!(failed("Lost", None), Some(ErrorKind::NotFound));
        // Of two copies the one that failed by what the condition says counts.
        let of = |state: CopyState, message: &str| {
            let ready = Condition::new(READY, ConditionStatus::False, "DataSourceFailed", "the server answered 404");
            let copy = DiskFileStatus { error_kind: Some(ErrorKind::NotFound), ..copy(state, 0, message, "") };
            verdict(&image("one", &[("a", copy)], Some(ready))).is_some()
        };
        assert!(of(CopyState::Failed, "the server answered 404"));
        assert!(!of(CopyState::Failed, "the server answered 410"));
        assert!(!of(CopyState::Starting, "the server answered 404"), "it is tried again already");
    }
}
