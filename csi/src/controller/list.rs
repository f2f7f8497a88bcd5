//! ListVolumes, ControllerGetVolume and the health calls.

use api::Volume;
use kube::ResourceExt;
use proto::csi;
use store::Selector;

use super::{Context, create};
use crate::deadline::Deadline;
use crate::{CsiError, volume};

/// Begins every token, so that one of somebody else's is noticed. The rest is the last name of the page before:
/// volumes that come or go between two pages never make another one appear twice or not at all.
const TOKEN: &str = "after:";

/// One page of `items`, sorted by name, and the token of the next page.
fn page<T>(
    items: Vec<T>,
    name: impl Fn(&T) -> String,
    max_entries: i32,
    starting_token: &str,
) -> Result<(Vec<T>, String), CsiError> {
    let most = usize::try_from(max_entries).map_err(|_| CsiError::Field {
        field: "max_entries",
        value: max_entries.to_string(),
        right: "0 (all) or more",
    })?;
    let after = match starting_token {
        "" => "",
        token => match token.strip_prefix(TOKEN) {
            Some(name) if !name.is_empty() => name,
            _ => return Err(CsiError::Token { token: token.to_owned() }),
        },
    };
    let mut items: Vec<T> = items.into_iter().filter(|item| name(item).as_str() > after).collect();
    items.sort_by_key(&name);
    let mut next = String::new();
    if most > 0 && items.len() > most {
        items.truncate(most);
        next = format!("{TOKEN}{}", items.last().map(&name).unwrap_or_default());
    }
    Ok((items, next))
}

/// All volumes, page by page.
pub async fn list_volumes(
    context: &Context,
    request: csi::ListVolumesRequest,
    _: &Deadline,
) -> Result<csi::ListVolumesResponse, CsiError> {
    let volumes = context.store.list::<Volume>(&Selector::default()).await?;
    let (volumes, next_token) = page(volumes, ResourceExt::name_any, request.max_entries, &request.starting_token)?;
    let entries = volumes
        .iter()
        .map(|v| csi::list_volumes_response::Entry {
            volume: Some(volume::describe(v)),
            status: Some(csi::list_volumes_response::VolumeStatus { published_node_ids: volume::published_nodes(v) }),
        })
        .collect();
    Ok(csi::ListVolumesResponse { entries, next_token })
}

/// One volume.
pub async fn get_volume(
    context: &Context,
    request: csi::ControllerGetVolumeRequest,
    _: &Deadline,
) -> Result<csi::ControllerGetVolumeResponse, CsiError> {
    let found = create::find(context, &request.volume_id).await?;
    Ok(csi::ControllerGetVolumeResponse {
        status: Some(csi::controller_get_volume_response::VolumeStatus {
            published_node_ids: volume::published_nodes(&found),
        }),
        volume: Some(volume::describe(&found)),
    })
}

/// The volumes that have problems, page by page.
pub async fn list_health(
    context: &Context,
    request: csi::ControllerListVolumeHealthRequest,
    _: &Deadline,
) -> Result<csi::ControllerListVolumeHealthResponse, CsiError> {
    let volumes = context.store.list::<Volume>(&Selector::default()).await?;
    let ill = volumes.iter().map(volume::health).filter(|h| !h.health_statuses.is_empty()).collect();
    let (entries, next_token) = page(ill, |h| h.volume_id.clone(), request.max_entries, &request.starting_token)?;
    Ok(csi::ControllerListVolumeHealthResponse { entries, next_token })
}

/// The problems of one volume.
pub async fn get_health(
    context: &Context,
    request: csi::ControllerGetVolumeHealthRequest,
    _: &Deadline,
) -> Result<csi::ControllerGetVolumeHealthResponse, CsiError> {
    let found = create::find(context, &request.volume_id).await?;
    Ok(csi::ControllerGetVolumeHealthResponse { volume_health: Some(volume::health(&found)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(items: &[&str], max: i32, token: &str) -> Result<(Vec<String>, String), CsiError> {
        page(items.iter().map(|i| i.to_string()).collect(), String::clone, max, token)
    }

    #[test]
    fn pages_never_repeat_when_volumes_come_and_go() {
        let (first, token) = check(&["c", "a", "b"], 2, "").unwrap();
        assert_eq!((first, token.as_str()), (vec!["a".to_owned(), "b".into()], "after:b"));
        let (second, end) = check(&["aa", "c", "d"], 2, &token).unwrap();
        assert_eq!((second, end.as_str()), (vec!["c".to_owned(), "d".into()], ""));
    }

    #[test]
    fn refuses_tokens_of_others_and_negative_pages() {
        use api::ErrorKind::{Invalid, Pending};
        assert_eq!(check(&[], 0, "invalid-token").unwrap_err().kind(), Pending);
        assert_eq!(check(&[], 0, "after:").unwrap_err().kind(), Pending);
        assert_eq!(check(&[], -1, "").unwrap_err().kind(), Invalid);
    }
}
