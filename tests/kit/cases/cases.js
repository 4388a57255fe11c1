// All cases, by name.
import "/cases_events.js";
import "/cases_object.js";
import "/cases_recovery.js";
import "/cases_polling.js";
import "/cases_alone.js";

export {cases} from "/registry.js";
