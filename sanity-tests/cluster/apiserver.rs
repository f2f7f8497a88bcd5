//! A real API server for the Rust tests of one program: `apiserver.sh` beside this file, which ends when the program does.
//!
//! A test includes it by `#[path]`; its crate needs `kube` as a (development) dependency.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use kube::config::{KubeConfigOptions, Kubeconfig};

/// A test of each promise of a contract, for `suite::promises!`. The test program says how one begins (`begin`, which is `None` where
/// there is no server and none is demanded) and what of it is handed to the promise (`open`).
#[allow(unused_macros, reason = "each test program uses its part")]
macro_rules! real {
    ($($promise:ident)*) => {
        mod contract { $(
            #[tokio::test]
            #[ignore = "needs a kube-apiserver: make cluster-test"]
            async fn $promise() {
                let Some(begun) = super::begin().await else { return };
                super::suite::$promise(super::open(&begun).await).await;
            }
        )* }
    };
}
#[allow(unused_imports, reason = "each test program uses its part")]
pub(crate) use real;

pub struct ApiServer {
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    folder: PathBuf,
    _script: Child,
}

/// The top of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

#[allow(dead_code, reason = "each test program uses its part")]
impl ApiServer {
    /// Starts it; `None` where its programs are not built and nobody demands them.
    pub fn begin() -> Option<ApiServer> {
        let mut script = Command::new(root().join("sanity-tests/cluster/apiserver.sh"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash is there");
        let (commands, answers) = (script.stdin.take().unwrap(), BufReader::new(script.stdout.take().unwrap()));
        let mut server = ApiServer { commands, answers, folder: PathBuf::new(), _script: script };
        let Some(ready) = server.answer() else {
            let missing = "there is no kube-apiserver to test with: run sanity-tests/cluster/build.sh kube (its words stand above)";
            assert!(std::env::var_os("REQUIRE_REAL").is_none(), "{missing}");
            // Past the test harness, which keeps to itself what a test prints that passes.
            std::io::stderr().write_all(format!("SKIPPED, nothing was tested: {missing}\n").as_bytes()).unwrap();
            return None;
        };
        server.folder = ready.strip_prefix("ready ").expect("it says where").into();
        Some(server)
    }

    fn answer(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.answers.read_line(&mut line).unwrap();
        (read > 0).then(|| line.trim().to_owned())
    }

    /// One of the script's commands.
    pub fn ask(&mut self, command: &str) -> String {
        writeln!(self.commands, "{command}").unwrap();
        self.answer().expect("the script goes on")
    }

    /// The credentials of a user: `admin`, or `stranger`, who may do nothing.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.kubeconfig"))
    }

    /// A client of that user, with connections of its own.
    pub async fn client(&self, user: &str) -> kube::Client {
        connect(Kubeconfig::read_from(self.kubeconfig(user)).unwrap()).await
    }

    /// A client of somebody of that name who belongs to these groups and may do everything.
    pub async fn client_of(&self, name: &str, groups: &[&str]) -> kube::Client {
        let mut file = Kubeconfig::read_from(self.kubeconfig("admin")).unwrap();
        let info = file.auth_infos[0].auth_info.as_mut().unwrap();
        info.impersonate = Some(name.to_owned());
        info.impersonate_groups = Some(["system:masters"].iter().chain(groups).map(|g| (*g).to_owned()).collect());
        connect(file).await
    }
}

async fn connect(file: Kubeconfig) -> kube::Client {
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    kube::Client::try_from(config).unwrap()
}
