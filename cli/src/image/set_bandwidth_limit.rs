//! `image set-bandwidth-limit`: how much of an image is transferred a second, also of what is being transferred.

use api::{BackingImage, setting};
use clap::Args;
use serde_json::Value;
use store::ResourceType;

use crate::client::Client;
use crate::roles;

/// Which limit for which image.
#[derive(Args, Debug)]
pub struct SetBandwidthLimit {
    name: String,
    /// Bytes a second that each disk sends of it, and that its data source downloads, such as 100Mi; 0: no limit of its own.
    #[arg(value_parser = roles::bandwidth_limit)]
    limit: u64,
}

/// Runs `image set-bandwidth-limit`.
pub async fn run(client: &Client, command: SetBandwidthLimit, namespace: &str) -> anyhow::Result<()> {
    let SetBandwidthLimit { name, limit } = command;
    let wish = |object: &mut Value| {
        object["spec"]["bandwidthLimit"] = limit.into();
        Ok(())
    };
    client.modify(&ResourceType::of::<BackingImage>(), Some(namespace), &name, wish).await?;
    print!("{}", told(&name, limit));
    Ok(())
}

fn told(name: &str, limit: u64) -> String {
    let setting = setting::BANDWIDTH_LIMIT;
    if limit == 0 {
        return format!("image `{name}` has no limit of its own; what setting {setting} says holds for it, too\n");
    }
    format!(
        "each disk sends at most {limit} bytes/s of image `{name}`, and its data source downloads no more; setting {setting} holds beside it\n"
    )
}
