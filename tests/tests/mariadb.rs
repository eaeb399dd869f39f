//! MariaDB through the ambassador: here the server speaks first.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use ambassador_tests::address::Family;
use ambassador_tests::pod;
use ambassador_tests::process::run;
use ambassador_tests::server::mariadb::Mariadb;
use ambassador_tests::way::{Road, Way};

#[test]
fn queries_are_answered() -> Result<()> {
    let pod = pod!("mariadb-install-db", "mariadbd", "mariadb");
    let mariadb = Mariadb::start(&pod.upstream)?;
    for way in Way::all()? {
        let road = Road::to(&mariadb.address.into(), way, &pod.inside, Family::Tcp)?;
        let query = "select count(*), length(group_concat(seq)) from seq_1_to_100";
        let answer = run(
            pod.inside
                .command("mariadb")
                .args(["--no-defaults", "--protocol=tcp", "--skip-column-names", "--batch"])
                .args(["-h", &road.address.host()?, "-P", &road.address.port()?.to_string()])
                .args(["-u", "root", "-D", "mysql", "-e", query]),
            Duration::from_secs(20),
        )
        .with_context(|| format!("by {way}"))?;
        ensure!(answer == "100\t291\n", "by {way}: {answer}");
    }
    Ok(())
}
