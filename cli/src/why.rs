//! `why`: what a thing waits for, in plain sentences.

use api::ErrorKind;
use clap::Args;
use jiff::Timestamp;
use planner::why::{self, Subject, World};
use serde::de::DeserializeOwned;
use store::{ResourceType, Scoped};

use crate::client::Client;
use crate::failure::failed;

/// Says why something is not as it should be, and what can be done.
#[derive(Args, Debug)]
pub struct Why {
    /// pvc, volume, image, replica, engine, node, backingimagemanager or backingimagedatasource.
    kind: String,
    name: String,
    /// Namespace of a claim.
    #[arg(short, long, default_value = "default", env = "BACKING_IMAGE_CSI_NAMESPACE")]
    namespace: String,
}

/// Runs `why`.
pub async fn run(client: &Client, Why { kind, name, namespace }: Why) -> anyhow::Result<()> {
    let Some(subject) = subject(&kind, &namespace, &name) else {
        let kinds = "pvc, volume, image, replica, engine, node, backingimagemanager, backingimagedatasource";
        return failed(ErrorKind::Invalid, format!("`why` knows nothing of `{kind}`; it knows {kinds}"));
    };
    let world = observe(client).await?;
    match why::explain(&world, &subject, Timestamp::now()) {
        Some(lines) => {
            print!("{}", why::render(&lines));
            Ok(())
        }
        None => failed(ErrorKind::NotFound, format!("{kind} `{name}` does not exist; `get {kind}` shows which do")),
    }
}

fn subject(kind: &str, namespace: &str, name: &str) -> Option<Subject> {
    let name = name.to_owned();
    if kind.eq_ignore_ascii_case("image") || kind.eq_ignore_ascii_case("images") {
        return Some(Subject::Image(name));
    }
    let served = controller::http::registry::by_word(kind)?;
    Some(match served.resource.kind.as_str() {
        "PersistentVolumeClaim" => Subject::Claim { namespace: namespace.to_owned(), name },
        "PersistentVolume" | "Volume" => Subject::Volume(name),
        "Engine" => Subject::Engine(name),
        "Replica" => Subject::Replica(name),
        "BackingImage" => Subject::Image(name),
        "BackingImageDataSource" => Subject::DataSource(name),
        "BackingImageManager" => Subject::Manager(name),
        "Node" => Subject::Node(name),
        _ => return None,
    })
}

async fn observe(client: &Client) -> anyhow::Result<World> {
    async fn all<T>(client: &Client) -> anyhow::Result<Vec<T>>
    where
        T: kube::Resource<DynamicType = ()> + DeserializeOwned,
        T::Scope: Scoped,
    {
        let resource = ResourceType::of::<T>();
        let items = client.items(&resource, None).await?;
        Ok(items.into_iter().map(serde_json::from_value).collect::<Result<_, _>>()?)
    }
    Ok(World {
        claims: all(client).await?,
        persistent_volumes: all(client).await?,
        classes: all(client).await?,
        attachments: all(client).await?,
        volumes: all(client).await?,
        engines: all(client).await?,
        replicas: all(client).await?,
        images: all(client).await?,
        data_sources: all(client).await?,
        managers: all(client).await?,
        nodes: all(client).await?,
        settings: all(client).await?,
    })
}
