//! A PostgreSQL of the tests' own: one cluster for those that run at the same time, and a database for each.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, Weak},
};

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

/// The cluster that runs, if one does.
static RUNNING: Mutex<Weak<Cluster>> = Mutex::new(Weak::new());

/// An empty database. The last one stops the cluster.
pub struct Postgres {
    pub url: String,
    _cluster: Arc<Cluster>,
}

impl Postgres {
    /// None, with a line that says so, where PostgreSQL is not installed; on a CI machine that is a failure.
    pub async fn start() -> Option<Self> {
        let Some(programs) = programs() else {
            super::not_run("PostgreSQL (apt-get install postgresql)");
            return None;
        };
        let cluster = tokio::task::spawn_blocking(move || Cluster::shared(&programs)).await.unwrap();
        let name = format!("t{}", attune::domain::id::random(12).to_lowercase());
        let mut connection = PgConnection::connect(&cluster.url("postgres")).await.unwrap();
        connection.execute(AssertSqlSafe(format!("CREATE DATABASE {name}"))).await.unwrap();
        Some(Self { url: cluster.url(&name), _cluster: cluster })
    }
}

struct Cluster {
    dir: tempfile::TempDir,
    programs: PathBuf,
}

impl Cluster {
    fn shared(programs: &Path) -> Arc<Self> {
        let mut running = RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(cluster) = running.upgrade() {
            return cluster;
        }
        let cluster = Arc::new(Self { dir: tempfile::tempdir().unwrap(), programs: programs.to_owned() });
        if is_root() {
            run(Command::new("chown").arg("postgres").arg(cluster.dir.path()));
        }
        run(cluster.program("initdb").args(["--username=attune", "--auth=trust", "--no-sync", "--encoding=UTF8"]));
        // A socket in our own folder: no port to collide on.
        let socket = cluster.dir.path().display();
        let options = format!("-k {socket} -c listen_addresses='' -c max_connections=300 -c fsync=off");
        let log = cluster.dir.path().join("log");
        run(cluster.program("pg_ctl").args(["start", "--wait", "--log"]).arg(log).args(["--options", &options]));
        *running = Arc::downgrade(&cluster);
        cluster
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://attune@localhost/{database}?host={}", self.dir.path().display())
    }

    /// One of PostgreSQL's programs on this cluster. None of them runs as root.
    fn program(&self, name: &str) -> Command {
        let program = self.programs.join(name);
        let mut command = if is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        command.current_dir(&self.dir).env("PGDATA", self.dir.path().join("data"));
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        _ = self.program("pg_ctl").args(["stop", "--mode=immediate"]).output();
    }
}

/// The folder of PostgreSQL's programs; Debian keeps them out of the search path.
fn programs() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let folders = std::env::split_paths(&path).chain(versions.map(|version| version.path().join("bin")));
    folders.into_iter().find(|folder| ["initdb", "pg_ctl", "postgres"].iter().all(|name| folder.join(name).is_file()))
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

fn run(command: &mut Command) {
    // The server would keep a pipe open.
    let file = tempfile::tempfile().unwrap();
    let status = command.stdout(file.try_clone().unwrap()).stderr(file.try_clone().unwrap()).status();
    let said = || {
        use std::io::{Read, Seek};
        let (mut file, mut text) = (file.try_clone().unwrap(), String::new());
        file.rewind().and_then(|()| file.read_to_string(&mut text)).map(|_| text)
    };
    assert!(status.is_ok_and(|status| status.success()), "{command:?}: {:?}", said());
}
