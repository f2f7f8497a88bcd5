//! Commands as people type them against an instance that answers as a test wants: each guard of a command alone.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use ::api::image::{CopyState, DiskFileStatus};
use ::api::names::condition::{READY, UPGRADED};
use ::api::{BackingImage, Condition, ConditionStatus, ErrorKind};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use super::*;

/// No command of these tests takes longer, unless it never ends.
const DEADLINE: Duration = Duration::from_secs(30);

/// What the instance answers to one request.
struct Reply {
    code: u16,
    lines: Vec<Value>,
    then: Then,
}

/// What follows the lines of an answer.
#[derive(Clone, Copy)]
enum Then {
    End,
    Silence,
    BrokenConnection,
}

fn ok(body: Value) -> Reply {
    Reply { code: 200, lines: vec![body], then: Then::End }
}

fn refused(code: u16) -> Reply {
    Reply { code, lines: vec![json!({ "message": format!("status {code}") })], then: Then::End }
}

/// A watch that goes on after these events.
fn watch(events: &[(&str, &Value)]) -> Reply {
    let lines = events.iter().map(|(kind, object)| json!({ "type": kind, "object": object })).collect();
    Reply { code: 200, lines, then: Then::Silence }
}

/// Requests as `METHOD plural/name`, with their bodies.
type Seen = Vec<(String, Value)>;
/// Answers a request; `nth` counts those that are the same, from 1.
type Script = dyn Fn(&str, usize, &Seen) -> Reply + Send + Sync;

struct Instance {
    address: String,
    seen: Arc<Mutex<Seen>>,
}

impl Instance {
    async fn new(script: impl Fn(&str, usize, &Seen) -> Reply + Send + Sync + 'static) -> Instance {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(vec![]));
        let script: Arc<Script> = Arc::new(script);
        let router = Router::new().fallback(answer).with_state((seen.clone(), script));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Instance { address, seen }
    }

    /// Runs a command; its exit code and sentence when it fails.
    async fn run(&self, words: &str) -> Result<(), (u8, String)> {
        let words = ["backing-image-csi", "--server", &self.address].into_iter().chain(words.split(' '));
        let cli = Cli::try_parse_from(words).unwrap();
        let ended = tokio::time::timeout(DEADLINE, dispatch(cli.command, Some(&cli.server.server))).await;
        ended.expect("the command ends").map_err(|error| (exit_code(&error), format!("{error:#}")))
    }

    async fn fails(&self, words: &str, code: u8, sentence: &str) {
        let (found, text) = self.run(words).await.unwrap_err();
        assert!(found == code && text.contains(sentence), "`{words}`: {found} {text}");
    }

    /// How often something was asked.
    fn count(&self, what: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|(seen, _)| seen == what).count()
    }

    fn body(&self, what: &str) -> Value {
        self.seen.lock().unwrap().iter().rfind(|(seen, _)| seen == what).unwrap().1.clone()
    }
}

async fn answer(
    State((seen, script)): State<(Arc<Mutex<Seen>>, Arc<Script>)>,
    method: Method,
    uri: Uri,
    body: Bytes,
) -> Response {
    let mut parts: Vec<&str> = uri.path().split('/').filter(|part| !part.is_empty()).collect();
    match parts[0] {
        "api" => drop(parts.drain(..2)),
        "apis" => drop(parts.drain(..3)),
        _ => {}
    }
    if parts[0] == "namespaces" {
        parts.drain(..2);
    }
    let method = if uri.query().unwrap_or_default().contains("watch=true") { "WATCH" } else { method.as_str() };
    let what = format!("{method} {}", parts.join("/"));
    let reply = {
        let mut seen = seen.lock().unwrap();
        seen.push((what.clone(), serde_json::from_slice(&body).unwrap_or_default()));
        let nth = seen.iter().filter(|(other, _)| *other == what).count();
        script(&what, nth, &seen)
    };
    let lines = reply.lines.into_iter().map(|line| Ok(format!("{line}\n")));
    let rest = match reply.then {
        Then::End => stream::empty().boxed(),
        Then::Silence => stream::pending().boxed(),
        // The server sends what it has when nothing more is ready.
        Then::BrokenConnection => stream::once(async {
            tokio::task::yield_now().await;
            Err(std::io::Error::other("broken"))
        })
        .boxed(),
    };
    let status = StatusCode::from_u16(reply.code).unwrap();
    (status, Body::from_stream(stream::iter(lines).chain(rest))).into_response()
}

/// A file with a document.
fn document(value: &Value) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), value.to_string()).unwrap();
    file
}

fn described(url: &str) -> Value {
    json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "BackingImage", "metadata": { "name": "one" },
        "spec": { "sourceType": "download", "sourceParameters": { "url": url } },
        "status": { "uuid": "of the file" },
    })
}

/// The same as it is stored.
fn stored(url: &str) -> Value {
    let mut object = described(url);
    object["apiVersion"] = "longhorn.io/v1beta9".into();
    object["metadata"] = json!({ "name": "one", "namespace": "longhorn-system", "resourceVersion": "7", "uid": "u" });
    object["status"]["uuid"] = "12345678".into();
    object
}

#[tokio::test]
async fn apply_writes_only_what_differs_and_never_a_status() {
    let instance = Instance::new(|_, _, _| ok(stored("http://a"))).await;
    let (same, other) = (document(&described("http://a")), document(&described("http://b")));
    instance.run(&format!("apply -f {}", same.path().display())).await.unwrap();
    assert_eq!(instance.count("PUT backingimages/one"), 0);
    instance.run(&format!("apply -f {}", other.path().display())).await.unwrap();
    let mut wanted = stored("http://a");
    wanted["spec"]["sourceParameters"]["url"] = "http://b".into();
    assert_eq!(instance.body("PUT backingimages/one"), wanted);
    // All files are read before anything is changed.
    let asked = instance.seen.lock().unwrap().len();
    let bad = document(&json!({ "kind": "X" }));
    let both = format!("apply -f {} -f {}", other.path().display(), bad.path().display());
    instance.fails(&both, 2, "document 1 needs `apiVersion` and `kind`").await;
    assert_eq!(instance.seen.lock().unwrap().len(), asked);
}

#[tokio::test]
async fn apply_looks_again_after_a_collision_but_not_for_ever() {
    let file = document(&described("http://b"));
    let apply = format!("apply -f {}", file.path().display());
    let changed = Instance::new(|what, nth, _| match what {
        "PUT backingimages/one" if nth < 3 => refused(409),
        _ => ok(stored("http://a")),
    });
    let changed = changed.await;
    changed.run(&apply).await.unwrap();
    assert_eq!((changed.count("GET backingimages/one"), changed.count("PUT backingimages/one")), (3, 3));
    // Somebody creates it, and deletes it again, at the wrong moments.
    let come_and_gone = Instance::new(|what, nth, _| match (what, nth) {
        ("GET backingimages/one", 1 | 3) => refused(404),
        ("POST backingimages", 1) => {
            let cause = json!({ "reason": "Incompatible" });
            Reply { lines: vec![json!({ "message": "exists", "details": { "causes": [cause] } })], ..refused(409) }
        }
        ("PUT backingimages/one", 1) => refused(404),
        _ => ok(stored("http://a")),
    });
    let come_and_gone = come_and_gone.await;
    come_and_gone.run(&apply).await.unwrap();
    assert_eq!((come_and_gone.count("POST backingimages"), come_and_gone.count("PUT backingimages/one")), (2, 1));
    let always =
        Instance::new(|what, _, _| if what.starts_with("PUT") { refused(409) } else { ok(stored("http://a")) });
    let always = always.await;
    always.fails(&apply, 7, "backingimage.longhorn.io/one: status 409").await;
    assert_eq!(always.count("PUT backingimages/one"), 11);
    let never = Instance::new(|what, _, _| if what.starts_with("PUT") { refused(400) } else { ok(stored("http://a")) });
    let never = never.await;
    never.fails(&apply, 2, "status 400").await;
    assert_eq!(never.count("PUT backingimages/one"), 1);
}

#[tokio::test]
async fn delete_waits_for_this_object_and_says_what_it_waits_for() {
    let held = || {
        let mut object = stored("http://a");
        object["metadata"]["finalizers"] = json!(["longhorn.io"]);
        object
    };
    let later = || {
        let mut object = stored("http://a");
        object["metadata"]["uid"] = "another".into();
        object
    };
    // It is there and stays.
    let stays = Instance::new(move |what, _, _| match what {
        "WATCH backingimages" => watch(&[("ADDED", &held()), ("DELETED", &later())]),
        _ => ok(held()),
    });
    let stays = stays.await;
    stays
        .fails("delete backingimage one --timeout 300ms", 7, "the owner of finalizer longhorn.io has to clean up")
        .await;
    stays.run("delete backingimage one --wait=false").await.unwrap();
    assert_eq!(stays.count("WATCH backingimages"), 1);
    // A condition says more than a finalizer.
    let told = Instance::new(move |what, _, _| {
        let mut object = held();
        object["status"]["conditions"] = json!([
            { "type": "A", "status": "True", "message": "fine" },
            { "type": "B", "status": "False", "message": "" },
            { "type": "C", "status": "False", "message": "a volume uses it" },
        ]);
        if what.starts_with("WATCH") { watch(&[("MODIFIED", &object)]) } else { ok(object) }
    });
    told.await.fails("delete backingimage one --timeout 300ms", 7, "a volume uses it").await;
    // It goes: the watch says so, only after changes were missed; or a later one of its name is there.
    let goes = Instance::new(move |what, nth, _| match what {
        "WATCH backingimages" if nth == 1 => watch(&[("ADDED", &held()), ("BOOKMARK", &Value::Null)]),
        "WATCH backingimages" => watch(&[("DELETED", &held())]),
        _ => ok(held()),
    });
    let goes = goes.await;
    goes.run("delete backingimage one").await.unwrap();
    assert_eq!(goes.count("WATCH backingimages"), 2);
    let replaced = Instance::new(move |what, _, _| match what {
        "WATCH backingimages" => watch(&[]),
        "GET backingimages/one" => ok(later()),
        _ => ok(held()),
    });
    replaced.await.run("delete backingimage one").await.unwrap();
    let replaced_then = Instance::new(move |what, _, _| match what {
        "WATCH backingimages" => watch(&[("ADDED", &later())]),
        _ => ok(held()),
    });
    replaced_then.await.run("delete backingimage one").await.unwrap();
    let gone = Instance::new(move |what, _, _| match what {
        "WATCH backingimages" => watch(&[]),
        "GET backingimages/one" => refused(404),
        _ => ok(held()),
    });
    gone.await.run("delete backingimage/one").await.unwrap();
}

#[tokio::test]
async fn delete_of_what_does_not_exist_fails_unless_that_is_wished() {
    let empty = Instance::new(|_, _, _| refused(404)).await;
    empty.fails("delete backingimage one", 3, "backingimage.longhorn.io/one does not exist").await;
    empty.run("delete backingimage one --ignore-not-found").await.unwrap();
    let file = document(&described("http://a"));
    empty.run(&format!("delete -f {}", file.path().display())).await.unwrap();
    empty.fails("delete backingimage", 2, "write: delete backingimage NAME").await;
    empty.fails("delete backingimage/one two", 2, "`two` is not of the form KIND/NAME").await;
    // What is described last goes first.
    let list = document(&json!({ "kind": "List", "items": [described("http://a"), {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": "claim" },
    }] }));
    let before = empty.seen.lock().unwrap().len();
    empty.run(&format!("delete --wait=false -f {}", list.path().display())).await.unwrap();
    let order: Vec<String> = empty.seen.lock().unwrap()[before..].iter().map(|(what, _)| what.clone()).collect();
    assert_eq!(order, ["DELETE persistentvolumeclaims/claim", "DELETE backingimages/one"]);
}

#[tokio::test]
async fn delete_of_a_claim_waits_for_its_volume_when_that_goes_too() {
    for (policy, waits) in [("Delete", true), ("Retain", false)] {
        let volume = json!({
            "metadata": { "name": "pv-1", "uid": "v", "finalizers": ["its-driver"] },
            "spec": { "persistentVolumeReclaimPolicy": policy },
        });
        let claim = json!({ "metadata": { "name": "claim", "uid": "c" }, "spec": { "volumeName": "pv-1" } });
        let instance = Instance::new(move |what, nth, _| match what {
            "GET persistentvolumeclaims/claim" if nth > 1 => refused(404),
            "GET persistentvolumeclaims/claim" | "DELETE persistentvolumeclaims/claim" => ok(claim.clone()),
            "GET persistentvolumes/pv-1" => ok(volume.clone()),
            _ => watch(&[]),
        });
        let instance = instance.await;
        match waits {
            true => instance.fails("delete pvc claim --timeout 300ms", 7, "its volume pv-1: it is being deleted").await,
            false => instance.run("delete pvc claim --timeout 300ms").await.unwrap(),
        }
    }
}

/// Engines and replicas name a volume too, which does not go with them.
#[tokio::test]
async fn only_a_claim_takes_its_volume_along() {
    let engine = json!({ "metadata": { "name": "e", "uid": "e" }, "spec": { "volumeName": "pv-1" } });
    let instance = Instance::new(move |what, _, _| match what {
        "DELETE engines/e" => ok(engine.clone()),
        "WATCH engines" => watch(&[("DELETED", &engine)]),
        "GET engines/e" => ok(engine.clone()),
        _ => refused(500),
    });
    let instance = instance.await;
    instance.run("delete engine e").await.unwrap();
    assert_eq!(instance.count("GET persistentvolumes/pv-1"), 0);
}

fn volume(state: &str) -> Value {
    json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "Volume", "metadata": { "name": "v-1" },
        "spec": { "size": "1048576" }, "status": { "state": state },
    })
}

/// An engine that answers a request, or says why it is not ready.
fn engine(requested: &Value, kind: &str, ok: bool, reason: &str, message: &str) -> Value {
    let condition =
        json!({ "type": kind, "status": if ok { "True" } else { "False" }, "reason": reason, "message": message });
    json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "Engine", "metadata": { "name": "v-1-e-0" },
        "spec": { "volumeName": "v-1", "nodeID": "node-1" },
        "status": { "upgradeRequestedAt": requested, "conditions": [condition] },
    })
}

#[tokio::test]
async fn an_engine_upgrade_ends_with_the_answer_to_this_request_only() {
    let cases = [
        (true, "Upgraded", Ok(())),
        (false, "Failed", Err((7, "engine of volume `v-1` on node-1: the answer"))),
        (false, "NoNeed", Err((5, "not upgraded, the engine of volume `v-1` on node-1: the answer"))),
    ];
    for (is_true, reason, wanted) in cases {
        let instance = Instance::new(move |what, nth, seen| match what {
            "GET persistentvolumeclaims/claim" => ok(json!({ "spec": { "volumeName": "pv-1" } })),
            "GET persistentvolumes/pv-1" => ok(json!({ "spec": { "csi": { "volumeHandle": "v-1" } } })),
            "PUT volumes/v-1" if nth == 1 => refused(409),
            "GET volumes/v-1" | "PUT volumes/v-1" => ok(volume("attached")),
            "GET engines/v-1-e-0" => ok(json!({})),
            "WATCH engines" if nth == 1 => {
                // Of a former request, by the other outcome; then none of this one yet; then changes are missed.
                let former = engine(&json!("2020-01-01T00:00:00Z"), UPGRADED, !is_true, reason, "former");
                watch(&[("ADDED", &former), ("BOOKMARK", &Value::Null)])
            }
            "WATCH engines" => {
                let requested = &seen.iter().rfind(|(what, _)| what == "PUT volumes/v-1").unwrap().1["spec"];
                let requested = &requested["engineUpgradeRequestedAt"];
                let unanswered = engine(requested, READY, false, "X", "waits");
                watch(&[
                    ("ADDED", &unanswered),
                    ("MODIFIED", &engine(requested, UPGRADED, is_true, reason, "the answer")),
                ])
            }
            _ => refused(404),
        });
        let ended = instance.await.run("volume upgrade-engine claim --timeout 20s").await;
        match (ended, wanted) {
            (Ok(()), Ok(())) => {}
            (Err((code, text)), Err((wanted, sentence))) => {
                assert!(
                    code == wanted && text.contains(sentence) && !text.contains("former"),
                    "{reason}: {code} {text}"
                );
            }
            (ended, wanted) => panic!("{reason}: {ended:?}, not {wanted:?}"),
        }
    }
}

#[tokio::test]
async fn an_engine_upgrade_that_cannot_be_says_why() {
    let detached = Instance::new(|what, _, _| match what {
        "GET volumes/v-1" | "PUT volumes/v-1" => ok(volume("detached")),
        _ => refused(404),
    });
    let detached = detached.await;
    detached
        .fails("volume upgrade-engine v-1 --timeout 1s", 5, "is not attached, so it has no engine to replace")
        .await;
    assert_eq!(detached.count("PUT volumes/v-1"), 0);
    detached.fails("volume upgrade-engine v-2 --timeout 1s", 3, "there is no claim or volume `v-2`").await;
    for (kind, code, sentence) in
        [("ADDED", 7, "is not replaced yet: the node is gone"), ("DELETED", 3, "was deleted meanwhile")]
    {
        let instance = Instance::new(move |what, _, _| match what {
            "GET volumes/v-1" | "PUT volumes/v-1" => ok(volume("attached")),
            "GET engines/v-1-e-0" => ok(json!({})),
            "WATCH engines" => watch(&[(kind, &engine(&json!(""), READY, false, "X", "the node is gone"))]),
            _ => refused(404),
        });
        instance.await.fails("volume upgrade-engine v-1 --timeout 300ms", code, sentence).await;
    }
}

#[tokio::test]
async fn a_volume_operation_ends_as_the_instance_says() {
    let of = |lines: Vec<Value>| {
        // Nothing but the operation is answered: to show the image meanwhile is a courtesy.
        Instance::new(move |what, _, _| match what {
            "POST standalone/v1/mount" => Reply { code: 200, lines: lines.clone(), then: Then::End },
            _ => refused(500),
        })
    };
    let mount = "volume mount v-1 --node node-1 --timeout 0s some/path";
    let done = of(vec![json!({ "say": "waiting" }), json!({ "done": { "path": "/x" } })]).await;
    done.run(mount).await.unwrap();
    let asked = done.body("POST standalone/v1/mount");
    let path = std::env::current_dir().unwrap().join("some/path");
    assert_eq!(asked["path"], path.to_str().unwrap(), "the instance may run elsewhere");
    assert_eq!(asked["timeoutSeconds"], 1, "no time at all could never be enough");
    let full = json!({ "failed": { "kind": "Exhausted", "message": "no room" } });
    of(vec![full]).await.fails(mount, 6, "no room").await;
    of(vec![json!({ "failed": { "kind": "Odd", "message": "odd" } })]).await.fails(mount, 70, "odd").await;
    of(vec![json!({ "say": "waiting" })])
        .await
        .fails(mount, 7, "ended in the middle of it; run the command again")
        .await;
    let broken = Instance::new(|what, _, _| match what {
        "POST standalone/v1/mount" => Reply { then: Then::BrokenConnection, ..ok(json!({ "say": "waiting" })) },
        _ => refused(500),
    });
    broken.await.fails(mount, 7, "the connection to the instance broke; run the command again").await;
}

fn image(copies: &[(&str, CopyState, &str)], ready: Option<(ConditionStatus, &str)>) -> Value {
    let mut image = BackingImage::new("one", Default::default());
    let mut status = ::api::image::BackingImageStatus::default();
    for (disk, state, verified_at) in copies {
        let mut copy = DiskFileStatus { state: *state, verified_at: (*verified_at).into(), ..Default::default() };
        if *state == CopyState::Failed {
            (copy.error_kind, copy.message) = (Some(ErrorKind::Corrupt), "chunk 3 differs".into());
        }
        status.disk_file_status_map.insert((*disk).into(), copy);
    }
    status.conditions =
        ready.map(|(ready, reason)| Condition::new(READY, ready, reason, "the reason")).into_iter().collect();
    image.status = Some(status);
    serde_json::to_value(image).unwrap()
}

#[tokio::test]
async fn a_wait_for_an_image_ends_when_it_is_ready_or_never_will_be() {
    use ConditionStatus::{False, True};
    let of = |events: Vec<(&'static str, Value)>, source: Option<Value>| {
        Instance::new(move |what, nth, _| match what {
            "GET nodes" => ok(json!({ "items": [] })),
            "GET backingimages/one" => ok(image(&[], None)),
            "GET backingimagedatasources/one" => source.clone().map_or_else(|| refused(404), ok),
            "WATCH backingimages" if nth == 1 => watch(&[("BOOKMARK", &Value::Null)]),
            "WATCH backingimages" => watch(&events.iter().map(|(kind, object)| (*kind, object)).collect::<Vec<_>>()),
            _ => refused(404),
        })
    };
    let wait = "image wait one --timeout 1s";
    let ready = || ("MODIFIED", image(&[], Some((True, ""))));
    let invalid = || ("ADDED", image(&[], Some((False, "Invalid"))));
    of(vec![("ADDED", image(&[], None)), ready()], None).await.run(wait).await.unwrap();
    of(vec![invalid(), ready()], None).await.fails(wait, 2, "image `one` cannot become ready: the reason").await;
    // The address was corrected a moment ago, and nothing has answered for the new one.
    let of_former = json!({
        "apiVersion": "longhorn.io/v1beta2", "kind": "BackingImageDataSource", "metadata": { "name": "one" },
        "spec": { "parameters": { "url": "http://former" } },
    });
    of(vec![invalid(), ready()], Some(of_former)).await.run(wait).await.unwrap();
    of(vec![("DELETED", image(&[], None))], None).await.fails(wait, 3, "was deleted").await;
    let odd = ("ADDED", image(&[], Some((ConditionStatus::Unknown, "Invalid"))));
    of(vec![odd], None).await.fails(wait, 7, "image `one` is not ready yet: the reason. It goes on").await;
    let absent = Instance::new(|what, _, _| match what {
        "GET nodes" => ok(json!({ "items": [] })),
        "WATCH backingimages" => watch(&[]),
        _ => refused(404),
    });
    absent.await.fails(wait, 3, "status 404").await;
}

#[tokio::test]
async fn a_verification_ends_with_what_is_known_of_each_copy() {
    use CopyState::{Failed, Ready};
    const LATER: &str = "2999-01-01T00:00:00Z";
    let of = |before: Value, events: Vec<(&'static str, Value)>| {
        Instance::new(move |what, nth, _| match what {
            "GET nodes" => ok(json!({ "items": [] })),
            "PUT backingimages/one" if nth == 1 => refused(409),
            "GET backingimages/one" | "PUT backingimages/one" => ok(before.clone()),
            "WATCH backingimages" if nth == 1 => watch(&[("BOOKMARK", &Value::Null)]),
            "WATCH backingimages" => watch(&events.iter().map(|(kind, object)| (*kind, object)).collect::<Vec<_>>()),
            _ => refused(404),
        })
    };
    let two = || image(&[("a", Ready, ""), ("b", Ready, "")], None);
    let verify = "image verify one --timeout 1s";
    let half = || ("ADDED", image(&[("a", Ready, LATER), ("b", Ready, "")], None));
    let whole = ("MODIFIED", image(&[("a", Ready, LATER), ("b", Ready, LATER)], None));
    let asked = of(two(), vec![half(), whole]).await;
    asked.run(verify).await.unwrap();
    assert_eq!(asked.body("PUT backingimages/one")["spec"]["verifyDisks"], json!([]), "all of them");
    let one = of(two(), vec![half()]).await;
    one.run("image verify one --timeout 1s --disk a").await.unwrap();
    assert_eq!(one.body("PUT backingimages/one")["spec"]["verifyDisks"], json!(["a"]));
    of(two(), vec![half()]).await.fails(verify, 7, "not all is known yet: the copy on b is being read").await;
    let lost = ("MODIFIED", image(&[("a", Failed, ""), ("b", Failed, "")], None));
    of(two(), vec![lost])
        .await
        .fails(verify, 8, "the copy on a: chunk 3 differs; the copy on b: chunk 3 differs")
        .await;
    of(two(), vec![half(), ("DELETED", two())]).await.fails(verify, 3, "was deleted").await;
    let none = of(image(&[("a", Failed, "")], None), vec![]).await;
    none.fails(verify, 5, "has no ready copy to verify").await;
    assert_eq!(none.count("PUT backingimages/one"), 0);
}

#[tokio::test]
async fn a_number_of_copies_is_written_and_waited_for_only_when_that_is_wished() {
    let copies = |ready: &[&str], wanted: u32| {
        let known: Vec<_> = ready.iter().map(|disk| (*disk, CopyState::Ready, "")).collect();
        let mut image = image(&known, Some((ConditionStatus::True, "FewerCopies")));
        image["spec"]["minNumberOfCopies"] = wanted.into();
        image["spec"]["diskFileSpecMap"] = ready.iter().map(|disk| ((*disk).to_owned(), json!({}))).collect();
        image
    };
    let of = |event: (&'static str, Value)| {
        Instance::new(move |what, nth, _| match what {
            "GET backingimages/one" => ok(copies(&["a"], 1)),
            "PUT backingimages/one" if nth == 1 => refused(409),
            "PUT backingimages/one" => ok(copies(&["a"], 2)),
            "WATCH backingimages" => watch(&[(event.0, &event.1)]),
            _ if what.starts_with("GET ") => ok(json!({ "items": [] })),
            _ => refused(404),
        })
    };
    let limited = of(("MODIFIED", copies(&["a"], 2))).await;
    limited.run("image set-bandwidth-limit one 100Mi").await.unwrap();
    assert_eq!(limited.body("PUT backingimages/one")["spec"]["bandwidthLimit"], json!(100 << 20));
    let set = "image set-copies one 2 --wait --timeout 1s";
    let done = of(("MODIFIED", copies(&["a", "b"], 2))).await;
    done.run(set).await.unwrap();
    assert_eq!(done.body("PUT backingimages/one")["spec"]["minNumberOfCopies"], json!(2));
    of(("ADDED", copies(&["a"], 2))).await.fails(set, 7, "not done yet: the reason. It goes on").await;
    of(("DELETED", copies(&["a"], 2))).await.fails(set, 3, "was deleted").await;
    let asked = of(("DELETED", copies(&["a"], 2))).await;
    asked.run("image set-copies one 2").await.unwrap();
    assert_eq!(asked.count("WATCH backingimages"), 0);
}
