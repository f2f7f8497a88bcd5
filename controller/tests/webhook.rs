//! The admission webhook against a real API server: the configurations of the chart, users, our own accounts, and certificates that change.
//!
//! `make cluster-test` runs it; it needs the programs that `sanity-tests/cluster/build.sh` builds.

extern crate store as backing_image_store;

#[path = "../../store/tests/apiserver/mod.rs"]
mod apiserver;
#[path = "../../store/tests/suite/mod.rs"]
mod suite;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use apiserver::Server;
use axum::body::Body;
use axum::http::Request;
use backing_image_controller::Metrics;
use backing_image_controller::http::{ApiState, router};
use backing_image_controller::webhook::{CONFIGURATION, Config, SECRET, Webhook};
use k8s_openapi::ByteString;
use serde_json::{Value, json};
use store::embedded::Embedded;
use store::kubernetes::Kubernetes;
use store::{Object, ObjectKey, ObjectStore, Preconditions, ResourceType, Store, StoreError};
use suite::{at, kind, object};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

const NAMESPACE: &str = "longhorn-system";
const LIMIT: Duration = Duration::from_secs(60);

fn ours(kind_name: &str) -> ResourceType {
    ResourceType { version: "v1beta2".into(), ..kind(api::names::GROUP, kind_name, true) }
}

fn configurations() -> [ResourceType; 2] {
    ["MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"]
        .map(|name| kind("admissionregistration.k8s.io", name, false))
}

fn key(name: &str) -> ObjectKey {
    ObjectKey { namespace: Some(NAMESPACE.into()), name: name.into() }
}

fn image(name: &str, spec: Value) -> Object {
    object(json!({ "metadata": { "name": name, "namespace": NAMESPACE }, "spec": spec }))
}

fn download() -> Value {
    json!({ "sourceParameters": { "url": " https://example.com/x.qcow2 " } })
}

/// A webhook of this process.
struct Hook {
    address: SocketAddr,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Hook {
    async fn start(server: &Server, change: impl FnOnce(&mut Config)) -> Hook {
        let store = Store::new(Arc::new(server.store("admin").await), NAMESPACE);
        let mut config = Config::new(store, "127.0.0.1:0".parse().unwrap(), Metrics::default());
        config.names.push("127.0.0.1".into());
        config.recheck = Duration::from_millis(300);
        change(&mut config);
        let webhook = Webhook::start(config).await.unwrap();
        let shutdown = CancellationToken::new();
        let (address, stop) = (webhook.address(), shutdown.clone());
        let task = tokio::spawn(async move { webhook.run(stop).await.unwrap() });
        Hook { address, shutdown, task }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(LIMIT, self.task).await.expect("it ends").unwrap();
    }
}

/// Forgets what the last test left beside the objects of our kinds.
async fn clear(admin: &Kubernetes) {
    let gone = Preconditions::default();
    for resource in configurations() {
        let key = ObjectKey { namespace: None, name: CONFIGURATION.into() };
        admin.delete(&resource, &key, &gone).await.unwrap();
    }
    admin.delete(&kind("", "Secret", true), &key(SECRET), &gone).await.unwrap();
}

/// The chart's configurations, which call this address instead of a Service.
async fn configure(admin: &Kubernetes, address: SocketAddr) {
    let chart = include_str!("../../deploy/chart/templates/webhook-configurations.yaml");
    let plain: Vec<&str> = chart.lines().filter(|line| !line.contains("include \"labels\"")).collect();
    let plain = plain.join("\n").replace("{{ .Release.Namespace }}", NAMESPACE);
    for (resource, text) in configurations().iter().zip(plain.split("---\n")) {
        let mut wanted = object(serde_yaml_ng::from_str(text).unwrap());
        let client = &mut wanted.0["webhooks"][0]["clientConfig"];
        let url = format!("https://{address}{}", client["service"]["path"].as_str().unwrap());
        *client = json!({ "url": url });
        admin.create(resource, wanted).await.unwrap();
    }
}

/// Waits until the API server asks us, and believes us.
async fn await_in_force(user: &Kubernetes) {
    let begun = Instant::now();
    loop {
        let said = match user.create(&ours("BackingImage"), image("bad", json!({}))).await {
            Err(error) => error.to_string(),
            Ok(_) => panic!("a bad image was stored"),
        };
        if said.contains("is not provided") {
            return;
        }
        assert!(begun.elapsed() < LIMIT, "{said}");
        tokio::time::sleep(Duration::from_millis(100)).await; // poll
    }
}

/// A cluster whose webhook is in force, and a user of it.
async fn begin(server: &Server, change: impl FnOnce(&mut Config)) -> (Hook, Kubernetes) {
    let admin = server.store("admin").await;
    clear(&admin).await;
    let hook = Hook::start(server, change).await;
    configure(&admin, hook.address).await;
    let user = server.store_of("jane", &[]).await;
    await_authority(&admin).await;
    await_in_force(&user).await;
    (hook, user)
}

async fn await_authority(admin: &Kubernetes) {
    let begun = Instant::now();
    while authorities(admin).await.iter().any(String::is_empty) {
        assert!(begun.elapsed() < LIMIT, "the authority is not written");
        tokio::time::sleep(Duration::from_millis(50)).await; // poll
    }
}

/// What the configurations trust.
async fn authorities(admin: &Kubernetes) -> Vec<String> {
    let mut found = vec![];
    for resource in configurations() {
        let key = ObjectKey { namespace: None, name: CONFIGURATION.into() };
        let configuration = admin.get(&resource, &key).await.unwrap().unwrap();
        let bundle = at(&configuration, "/webhooks/0/clientConfig/caBundle").clone();
        let bundle: ByteString = serde_json::from_value(bundle).unwrap_or_default();
        found.push(String::from_utf8(bundle.0).unwrap());
    }
    found
}

/// The HTTP API of the standalone mode over an empty store: what it makes of a new object.
async fn standalone(resource: &ResourceType, new: &Object) -> (u16, Value) {
    let (_sender, ready) = tokio::sync::watch::channel(Ok(()));
    let api = router(ApiState {
        store: Store::new(Arc::new(Embedded::in_memory()), NAMESPACE),
        metrics: Default::default(),
        ready,
        shutdown: CancellationToken::new(),
    });
    let path = format!("/apis/longhorn.io/v1beta2/namespaces/{NAMESPACE}/{}", resource.plural);
    let body = Body::from(Value::Object(new.0.clone()).to_string());
    let answer = api.oneshot(Request::post(path).body(body).unwrap()).await.unwrap();
    let code = answer.status().as_u16();
    let bytes = axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
    (code, serde_json::from_slice(&bytes).unwrap())
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn a_mistake_is_refused_in_the_same_sentence_as_by_the_standalone_mode() {
    let Some(server) = apiserver::take().await else { return };
    let (hook, user) = begin(server.as_ref().unwrap(), |_| ()).await;
    let setting = |name: &str, value: &str| {
        object(json!({ "metadata": { "name": name, "namespace": NAMESPACE }, "value": value }))
    };
    let node = json!({ "metadata": { "name": "n", "namespace": NAMESPACE }, "spec": { "tags": ["a b"] } });
    let volume = json!({
        "metadata": { "name": "v", "namespace": NAMESPACE },
        "spec": { "size": "1000", "numberOfReplicas": 30, "backingImage": "none" },
    });
    let no_name = json!({ "size": "1048576", "numberOfReplicas": 1, "backingImage": ".." });
    for (resource, bad) in [
        (ours("BackingImage"), image("a", json!({ "sourceParameters": { "url": "ftp://x/y" }, "checksum": "abc" }))),
        (ours("BackingImage"), image("a", json!({ "sourceType": "download", "sourceParameters": { "ulr": "x" } }))),
        (ours("BackingImage"), image("b", json!({ "sourceType": "upload", "secret": "s", "nodeSelector": ["a,b"] }))),
        (ours("Volume"), object(volume)),
        (ours("Volume"), image("v", no_name)),
        (ours("Node"), object(node)),
        (ours("Setting"), setting("default-replica-count", "0")),
        (ours("Setting"), setting("backing-image-allowed-source-addresses", "localhost")),
        (ours("Setting"), setting("color", "red")),
    ] {
        let (code, status) = standalone(&resource, &bad).await;
        let sentence = status["message"].as_str().unwrap();
        assert_eq!(code, 422, "{sentence}");
        let error = user.create(&resource, bad).await.unwrap_err();
        assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
        assert!(error.to_string().ends_with(&format!("denied the request: {sentence}")), "{error}\n{sentence}");
    }
    hook.stop().await;
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn what_is_left_out_is_filled_in_as_by_the_standalone_mode() {
    let Some(server) = apiserver::take().await else { return };
    let (hook, user) = begin(server.as_ref().unwrap(), |_| ()).await;
    let wanted = image("plain", download());
    let stored = user.create(&ours("BackingImage"), wanted.clone()).await.unwrap();
    let (code, standalone) = standalone(&ours("BackingImage"), &wanted).await;
    assert_eq!(code, 201, "{standalone}");
    for field in ["/metadata/labels", "/metadata/finalizers"] {
        assert_eq!(Some(at(&stored, field)), standalone.pointer(field), "{field}");
    }
    for field in ["sourceType", "sourceParameters", "minNumberOfCopies", "checksum", "dataEngine"] {
        assert_eq!(stored.0["spec"][field], standalone["spec"][field], "{field}");
    }
    assert_eq!(stored.0["spec"]["minNumberOfCopies"], 3);
    assert_eq!(stored.0["spec"]["sourceParameters"]["url"], "https://example.com/x.qcow2");

    let without_image = image("blank", json!({ "size": "1048576", "numberOfReplicas": 1 }));
    user.create(&ours("Volume"), without_image).await.unwrap();

    let mut prefixed = image("", download());
    prefixed.0["metadata"] = json!({ "generateName": "made-", "namespace": NAMESPACE });
    let made = user.create(&ours("BackingImage"), prefixed).await.unwrap();
    assert!(made.name().starts_with("made-") && !made.name().ends_with("00000"), "{}", made.name());

    let mut changed = stored.clone();
    changed.0["spec"]["checksum"] = " abc ".into();
    let error = user.replace(&ours("BackingImage"), changed.clone()).await.unwrap_err();
    assert!(error.to_string().contains("invalid checksum"), "{error}");
    changed.0["spec"]["checksum"] = format!(" {} ", "a".repeat(128)).into();
    let changed = user.replace(&ours("BackingImage"), changed).await.unwrap();
    assert_eq!(changed.0["spec"]["checksum"], "a".repeat(128));
    hook.stop().await;
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn an_image_in_use_is_not_deleted() {
    let Some(server) = apiserver::take().await else { return };
    let (hook, user) = begin(server.as_ref().unwrap(), |_| ()).await;
    user.create(&ours("BackingImage"), image("one", download())).await.unwrap();
    let spec = json!({ "size": "10485760", "backingImage": "one", "numberOfReplicas": 1 });
    user.create(&ours("Volume"), image("v", spec)).await.unwrap();
    let gone = Preconditions::default();
    let error = user.delete(&ours("BackingImage"), &key("one"), &gone).await.unwrap_err();
    assert!(matches!(error, StoreError::Forbidden { .. }), "{error:?}");
    assert!(
        error.to_string().contains("since there are replicas using it: those of volume v; delete volume v first"),
        "{error}"
    );
    user.delete(&ours("Volume"), &key("v"), &gone).await.unwrap();
    let last = user.delete(&ours("BackingImage"), &key("one"), &gone).await.unwrap().unwrap();
    assert!(at(&last, "/metadata/deletionTimestamp").is_string());
    hook.stop().await;
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn while_nobody_answers_users_wait_and_our_own_accounts_go_on() {
    let Some(server) = apiserver::take().await else { return };
    let server = server.as_ref().unwrap();
    let (hook, user) = begin(server, |_| ()).await;
    let stored = user.create(&ours("BackingImage"), image("one", download())).await.unwrap();
    hook.stop().await;

    let error = user.create(&ours("BackingImage"), image("two", download())).await.unwrap_err();
    assert!(api::error::sentence(&error).contains("failed calling webhook"), "{}", api::error::sentence(&error));
    let account = format!("system:serviceaccount:{NAMESPACE}:backing-image-csi-controller");
    let group = format!("system:serviceaccounts:{NAMESPACE}");
    let controller = server.store_of(&account, &["system:serviceaccounts", &group]).await;
    controller.create(&ours("BackingImage"), image("two", download())).await.unwrap();
    let account = "system:serviceaccount:kube-system:namespace-controller";
    let cluster = server.store_of(account, &["system:serviceaccounts:kube-system"]).await;
    cluster.delete(&ours("BackingImage"), &key("two"), &Preconditions::default()).await.unwrap();

    // The status is an observation, which nobody is asked about.
    let mut seen = stored.clone();
    seen.0.insert("status".into(), json!({ "uuid": "12345678" }));
    user.replace_status(&ours("BackingImage"), seen).await.unwrap();
    // What is being deleted may be let go.
    let deleting = cluster.delete(&ours("BackingImage"), &key("one"), &Preconditions::default()).await.unwrap();
    let mut free = deleting.unwrap();
    free.0["metadata"].as_object_mut().unwrap().shift_remove("finalizers");
    user.replace(&ours("BackingImage"), free).await.unwrap();
    assert!(user.get(&ours("BackingImage"), &key("one")).await.unwrap().is_none());
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn what_is_being_deleted_is_let_go_without_us_and_keeps_its_content() {
    let Some(server) = apiserver::take().await else { return };
    let server = server.as_ref().unwrap();
    let (hook, user) = begin(server, |_| ()).await;
    let setting = json!({ "metadata": { "name": "default-replica-count", "namespace": NAMESPACE }, "value": "2" });
    let mut held = vec![
        (ours("Volume"), image("v", json!({ "size": "1048576", "numberOfReplicas": 1 }))),
        (ours("Setting"), object(setting)),
        (ours("Node"), image("n", json!({ "tags": ["a"] }))),
        (ours("BackingImage"), image("one", download())),
    ];
    let account = "system:serviceaccount:kube-system:namespace-controller";
    let cluster = server.store_of(account, &["system:serviceaccounts:kube-system"]).await;
    for (resource, held) in &mut held {
        held.0["metadata"]["finalizers"] = json!(["longhorn.io", "example.com/held"]);
        *held = user.create(resource, held.clone()).await.unwrap();
        if resource.kind == "BackingImage" {
            held.0.insert("status".into(), json!({ "uuid": "12345678", "checksum": "a".repeat(128) }));
            user.replace_status(resource, held.clone()).await.unwrap();
        }
        *held = cluster.delete(resource, &key(held.name()), &Preconditions::default()).await.unwrap().unwrap();
        assert!(at(held, "/metadata/deletionTimestamp").is_string());
    }

    let other = |spec: Value| {
        let mut other = held.last().unwrap().1.clone();
        other.0["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        other
    };
    let another_checksum = json!({ "checksum": "b".repeat(128) });
    let another_address = json!({ "sourceParameters": { "url": "https://example.com/other" } });
    for spec in [another_checksum, another_address] {
        let error = user.replace(&ours("BackingImage"), other(spec)).await.unwrap_err();
        assert!(matches!(error, StoreError::Invalid { .. }), "{error:?}");
        assert!(error.to_string().contains("it cannot be changed any more"), "{error}");
    }
    let wished = user.replace(&ours("BackingImage"), other(json!({ "minNumberOfCopies": 1 }))).await.unwrap();
    held.last_mut().unwrap().1 = wished;
    let on_it = image("late", json!({ "size": "1048576", "numberOfReplicas": 1, "backingImage": "one" }));
    let error = user.create(&ours("Volume"), on_it).await.unwrap_err();
    assert!(error.to_string().contains("it is being deleted; wait until it is gone"), "{error}");
    hook.stop().await;

    // Nobody answers: what holds them is taken off one by one, and nothing else passes.
    for (resource, mut held) in held {
        for finalizers in [json!(["example.com/held"]), json!([])] {
            held.0["metadata"]["finalizers"] = finalizers;
            held = user.replace(&resource, held).await.unwrap_or_else(|e| panic!("{}: {e}", resource.kind));
            if resource.kind == "BackingImage" && at(&held, "/metadata/finalizers").is_array() {
                let mut other = held.clone();
                other.0["spec"]["checksum"] = "b".repeat(128).into();
                let error = user.replace(&resource, other).await.unwrap_err();
                assert!(api::error::sentence(&error).contains("failed calling webhook"), "{error}");
            }
        }
        assert!(user.get(&resource, &key(held.name())).await.unwrap().is_none(), "{}", resource.kind);
    }
}

/// What a client that trusts these authorities gets to hear; each call is a connection of its own.
async fn is_believed(authorities: &str, address: SocketAddr) -> Result<(), String> {
    let certificates = reqwest::Certificate::from_pem_bundle(authorities.as_bytes()).map_err(|e| e.to_string())?;
    let client = reqwest::Client::builder().no_proxy().tls_certs_only(certificates).build().unwrap();
    let answer = client.get(format!("https://{address}/healthz")).timeout(LIMIT).send().await;
    answer.map(drop).map_err(|error| api::error::sentence(&error))
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn certificates_are_replaced_while_they_are_in_use() {
    let Some(server) = apiserver::take().await else { return };
    let server = server.as_ref().unwrap();
    // Each one is due to be replaced as soon as it is made.
    let (hook, user) = begin(server, |config| config.renew_days = config.lifetime_days + 1).await;
    let admin = server.store("admin").await;
    let (mut served, mut number, begun) = (BTreeSet::new(), 0, Instant::now());
    while served.len() < 5 {
        assert!(begun.elapsed() < LIMIT, "only {} certificates", served.len());
        let trusted = authorities(&admin).await;
        for authorities in trusted {
            is_believed(&authorities, hook.address).await.unwrap();
        }
        number += 1;
        user.create(&ours("BackingImage"), image(&format!("image-{number}"), download())).await.unwrap();
        let secret = admin.get(&kind("", "Secret", true), &key(SECRET)).await.unwrap().unwrap();
        served.insert(at(&secret, "/data/tls.crt").as_str().unwrap().to_owned());
    }
    assert!(number >= 5, "{number} images");
    hook.stop().await;
}

#[tokio::test]
#[ignore = "needs a kube-apiserver: make cluster-test"]
async fn replicas_that_start_at_once_serve_one_certificate() {
    let Some(server) = apiserver::take().await else { return };
    let server = server.as_ref().unwrap();
    let admin = server.store("admin").await;
    for _ in 0..5 {
        clear(&admin).await;
        configure(&admin, "127.0.0.1:1".parse().unwrap()).await;
        let start = || Hook::start(server, |config| config.recheck = LIMIT);
        let hooks: [Hook; 3] = tokio::join!(start(), start(), start()).into();
        let [one, two] = authorities(&admin).await.try_into().unwrap();
        assert_eq!(one, two);
        assert_eq!(one.matches("BEGIN CERTIFICATE").count(), 1);
        for hook in hooks {
            is_believed(&one, hook.address).await.unwrap();
            hook.stop().await;
        }
    }
}
